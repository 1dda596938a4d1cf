"""Hashes of shards of the shipped photographs, made without Ray; as a script prints them as JSON.

Needs what makes a shard and nothing else, no torch either: so that it runs with many versions of those libraries.
"""

import hashlib
import json
import tempfile
from pathlib import Path

from degradation_bytes import hashes

from deedsr.dataset.recipe import Recipe, load_recipe
from pipelines.shards.build import FromSources
from pipelines.shards.listing import list_sources
from pipelines.shards.plan import plan_shards
from pipelines.storage import open_storage

PHOTOS = Path(__file__).parent.parent / "deedsr" / "assets" / "photos" / "validation"


def shards() -> str:
    """Of the tars of the photographs for validation, in their order."""
    fields = load_recipe("deedsr").model_dump(mode="json")
    fields["crop"] |= {"size": 128, "per_source": 2}
    fields |= {"variants": 2, "shard": {"min_sources": 1, "target_sources": 3, "max_sources": 4}}
    recipe = Recipe.model_validate(fields)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        out = open_storage(folder)
        for plan in plan_shards(list_sources([str(PHOTOS)]), recipe):
            digest.update(FromSources(recipe).build(plan, out).sha256.encode())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    print(json.dumps(hashes() | {"shards": shards()}))
