"""Which sources make which shard: a pure function of the listing and the recipe.

Within one `--source` and split, sources are ordered by the SHA-256 of what they are called, and a shard ends after a
source whose hash says so, between a least and a greatest number of sources. So a shard depends on its own sources and
on little else: adding a source rewrites the shard it falls into, or cuts it in two.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

from deedsr.dataset.manifest import FORMAT_VERSION
from deedsr.degradation.recipe import ALGORITHM_VERSION, Recipe, Shard, Split
from pipelines.shards.sources import Source

__all__ = ["ShardPlan", "plan_shards"]


@dataclass(frozen=True)
class ShardPlan:
    """The sources of one shard, in order.

    `number` says where the shard stands: three digits of the root, ten of the hash of its first source. `id` names the
    work: recipe, algorithm, and the path, size and version of each source. Equal ids, equal shards.
    """

    root: int
    split: str
    sources: tuple[Source, ...]
    number: str
    id: str


def plan_shards(sources: Sequence[Source], recipe: Recipe) -> list[ShardPlan]:
    """The shards in the manifest's order: by root, split, and hash of the first source."""
    hashed = sorted((source.root, split_of(source, recipe.split), _hash(source), source) for source in sources)
    digest = recipe.digest
    return [
        _plan(root, split, run, digest)
        for (root, split), group in groupby(hashed, key=lambda item: item[:2])
        for run in _cut([(hash, source) for _, _, hash, source in group], recipe.shard)
    ]


def split_of(source: Source, split: Split) -> str:
    """`validation` if a pattern matches the relative path; without patterns, if the hash falls into the share."""
    if split.validation_patterns:
        chosen = any(fnmatchcase(source.path, pattern) for pattern in split.validation_patterns)
    else:
        chosen = int.from_bytes(_hash(source)[8:16]) < split.validation_share * 2**64
    return "validation" if chosen else "train"


def _hash(source: Source) -> bytes:
    # Names of files need not be valid Unicode; such a source is rejected later, and must have a place until then.
    return hashlib.sha256(f"{source.root}\n{source.path}".encode(errors="surrogateescape")).digest()


def _cut(ordered: Sequence[tuple[bytes, Source]], shard: Shard) -> list[list[tuple[bytes, Source]]]:
    runs: list[list[tuple[bytes, Source]]] = [[]]
    for hash, source in ordered:
        if runs[-1] and _ends(runs[-1], shard):
            runs.append([])
        runs[-1].append((hash, source))
    return runs


def _ends(run: Sequence[tuple[bytes, Source]], shard: Shard) -> bool:
    # Other bytes of the hash than the ones that order: those of a run's last source say little about it.
    last_says_so = int.from_bytes(run[-1][0][16:]) % shard.target_sources == 0
    return len(run) >= shard.max_sources or (len(run) >= shard.min_sources and last_says_so)


def _plan(root: int, split: str, run: Sequence[tuple[bytes, Source]], recipe_digest: str) -> ShardPlan:
    listing = [(source.path, source.size, source.version) for _, source in run]
    work = json.dumps([FORMAT_VERSION, recipe_digest, ALGORITHM_VERSION, root, split, listing])
    leading = int.from_bytes(run[0][0][:8]) * 10**10 >> 64
    return ShardPlan(
        root,
        split,
        tuple(source for _, source in run),
        f"{root:03d}{leading:010d}",
        hashlib.sha256(work.encode()).hexdigest(),
    )
