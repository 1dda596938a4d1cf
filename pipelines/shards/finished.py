"""Whether a dataset is finished as the same command would make it now, found out without making or writing anything."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest

from deedsr.dataset.manifest import MANIFEST
from deedsr.dataset.recipe import Recipe
from deedsr.errors import DatasetNotCommitted
from pipelines.data.dataset import Dataset
from pipelines.models import Base, Learner
from pipelines.shards.encode import Precision, latents_source
from pipelines.shards.generate import ShardsResult
from pipelines.shards.listing import list_pairs, list_sources
from pipelines.shards.plan import ShardPlan, derived_plan, plan_shards
from pipelines.shards.shard import Inventory, tar_name


def finished_shards(
    out: str,
    recipe: Recipe,
    *,
    sources: Sequence[str] = (),
    pairs: Sequence[str] = (),
    hr_from: str | None = None,
    join: str | None = None,
) -> ShardsResult | None:
    """What `generate`, `regenerate` or `export_pairs` would return, if they would make no shard and the same manifest.

    None where that cannot be known without reading all sources, as with a recipe that rejects duplicates.
    """
    if (dataset := _dataset(out)) is None:
        return None
    if hr_from or join:
        origin = Dataset.open(hr_from or join or "").require_pixels("--hr-from" if hr_from else "--join")
        origin = origin.hr_dataset() if hr_from else origin
        recipe = origin.recipe.degrading(recipe) if hr_from else origin.recipe
        work = recipe.digest if hr_from else "join"
        plans: Iterable[ShardPlan] = (derived_plan(shard, work) for shard in origin.manifest.shards)
    elif recipe.duplicates == "reject":
        return None
    else:
        plans = plan_shards(list_pairs(sources, pairs, recipe.scale) if pairs else list_sources(sources), recipe)
    same = dataset.manifest.recipe_digest == recipe.digest  # as the plans' shards say too, once all is listed
    return _result(dataset) if same and _holds(dataset, plans) else None


def finished_latents(
    data: str, base: Base, learner: Learner | None, out: str, precision: Precision = "fp32"
) -> ShardsResult | None:
    """What `make_latents` would return, if it would make no shard."""
    if (dataset := _dataset(out)) is None or (made_of := dataset.manifest.latents) is None:
        return None
    pixels = Dataset.open(data).require_pixels("--data")
    source = latents_source(pixels, base, learner, precision)
    return _result(dataset) if made_of == replace(source, uri=made_of.uri) else None


def _dataset(out: str) -> Dataset | None:
    try:
        return Dataset.open(out)
    except DatasetNotCommitted:
        return None


def _holds(dataset: Dataset, plans: Iterable[ShardPlan]) -> bool:
    """Whether the dataset's shards are those that the plans name, and there. Ends with the first that is not."""
    inventory = Inventory.of(dataset.storage)
    held = (plan for plan in plans if not inventory.holds(plan) or inventory.records[plan.id][1])
    names = (tar_name(plan, inventory.records[plan.id][0]) if inventory.holds(plan) else "" for plan in held)
    return all(name == entry for name, entry in zip_longest(names, (s.name for s in dataset.manifest.shards)))


def _result(dataset: Dataset) -> ShardsResult:
    manifest = dataset.manifest
    return ShardsResult(
        manifest=f"{dataset.uri}/{MANIFEST}",
        digest=manifest.digest,
        samples=manifest.samples,
        validation=dataset.index("validation").num_rows,
        shards=len(manifest.shards),
        written=0,
        reused=len(manifest.shards),
        rejected=manifest.rejected,
        seconds=0.0,
        start_up_seconds=0.0,
        samples_per_second=0.0,
    )
