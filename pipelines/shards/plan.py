"""Which sources make which shard: a pure function of the listing and the recipe.

Within one `--source` and split, sources are ordered by the SHA-256 of what they are called, and a shard ends after a
source whose hash says so, between a least and a greatest number of sources. So a shard depends on its own sources and
on little else: adding a source rewrites the shard it falls into, or cuts it in two. Sources inside one file (a tar, a
Parquet table) stay together in their order, so that a shard reads few files.

A listing of any length is planned in bounded memory: it is sorted through temporary files, bucket by bucket.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from deedsr.dataset.manifest import FORMAT_VERSION, ShardEntry
from deedsr.dataset.recipe import ALGORITHM_VERSION, Recipe, Shard, Split
from pipelines.shards.source import Source
from pipelines.storage.lock import scratch_folder

_IN_MEMORY = 200_000  # sources held before they go to files
_BUCKETS = 64  # per root and split: ten million sources are 160,000 at a time


@dataclass(frozen=True)
class ShardPlan:
    """The sources of one shard, in order; or the shard of another dataset that it derives from.

    `number` orders the shards: three digits of the root, ten of the hash of its first source, and twelve of
    that source's place where it lies inside another file. `id` names the work: recipe, algorithm, and the path, size
    and version of each source, or the content of the shard behind. Equal ids, equal shards.
    """

    root: int
    split: str
    number: str
    id: str
    sources: tuple[Source, ...] = ()
    origin: str = ""  # name of the shard it derives from

    def to_json(self) -> bytes:
        """One line."""
        return json.dumps([self.root, self.split, self.number, self.id, self.sources, self.origin]).encode()

    @classmethod
    def from_json(cls, line: bytes) -> "ShardPlan":
        root, split, number, id, sources, origin = json.loads(line)
        return cls(root, split, number, id, tuple(Source(*source) for source in sources), origin)


def plan_shards(sources: Iterable[Source], recipe: Recipe) -> Iterator[ShardPlan]:
    """The shards in the manifest's order: by root, split, and hash of the first source."""
    digest = recipe.digest
    with scratch_folder() as folder:
        ordered = _sorted(sources, recipe.split, folder)
        for (root, split), group in groupby(ordered, key=lambda placed: (placed.root, placed.split)):
            for run in _cut(group, recipe.shard):
                yield _plan(root, split, run, digest)


def derived_plan(shard: ShardEntry, work: str) -> ShardPlan:
    """A shard that is made of a shard of another dataset; `work` names what is done to it (a recipe's digest, ...)."""
    split, number, _ = shard.name.split("-")
    id = hashlib.sha256(json.dumps([FORMAT_VERSION, ALGORITHM_VERSION, work, shard.sha256]).encode()).hexdigest()
    return ShardPlan(int(number[:3]), split, number, id, origin=shard.name)


class _Placed(NamedTuple):
    """A source and where it stands. The fields are in the order of sorting."""

    root: int
    split: str
    place: str  # hexadecimal hash of the file it lies in
    position: int  # within that file
    hash: str  # its own, hexadecimal
    source: Source


def _placed(source: Source, split: Split) -> _Placed:
    hash = _hash(source.root, source.path)
    place = _hash(source.root, source.container) if source.container else hash
    position = max(source.offset, source.row, 0)
    return _Placed(source.root, _split(source, hash, split), place.hex(), position, hash.hex(), source)


def _split(source: Source, hash: bytes, split: Split) -> str:
    """`validation` if a pattern matches the relative path; without patterns, if the hash falls into the share."""
    if split.validation_patterns:
        chosen = any(fnmatchcase(source.path, pattern) for pattern in split.validation_patterns)
    else:
        chosen = int.from_bytes(hash[8:16]) < split.validation_share * 2**64
    return "validation" if chosen else "train"


def _hash(root: int, path: str) -> bytes:
    # Names of files need not be valid Unicode; such a source is rejected later, and must have a place until then.
    return hashlib.sha256(f"{root}\n{path}".encode(errors="surrogateescape")).digest()


def _sorted(sources: Iterable[Source], split: Split, folder: Path) -> Iterator[_Placed]:
    """Every source in its place, through files below `folder` if there are many."""
    held: list[_Placed] = []
    buckets: set[tuple[int, str, int]] = set()
    for source in sources:
        held.append(_placed(source, split))
        if len(held) == _IN_MEMORY:
            buckets |= _spill(held, folder)
            held.clear()
    if not buckets:
        yield from sorted(held)
        return
    buckets |= _spill(held, folder)
    held.clear()
    for bucket in sorted(buckets):
        with _file(folder, bucket).open("rb") as lines:
            rows = [json.loads(line) for line in lines]
        yield from sorted(_Placed._make([*row[:-1], Source(*row[-1])]) for row in rows)


def _spill(held: list[_Placed], folder: Path) -> set[tuple[int, str, int]]:
    """Appends sources to the files of their buckets; returns the buckets."""
    bucket = lambda placed: (placed.root, placed.split, int(placed.place[:8], 16) * _BUCKETS >> 32)
    keyed = sorted(((bucket(placed), placed) for placed in held), key=itemgetter(0))
    for key, group in groupby(keyed, key=itemgetter(0)):
        with _file(folder, key).open("ab") as file:
            file.writelines(json.dumps(placed).encode() + b"\n" for _, placed in group)
    return {key for key, _ in keyed}


def _file(folder: Path, bucket: tuple[int, str, int]) -> Path:
    return folder / "-".join(map(str, bucket))


def _cut(ordered: Iterable[_Placed], shard: Shard) -> Iterator[list[_Placed]]:
    run: list[_Placed] = []
    for placed in ordered:
        if run and _ends(run, shard):
            yield run
            run = []
        run.append(placed)
    yield run


def _ends(run: list[_Placed], shard: Shard) -> bool:
    # Other bytes of the hash than those that define the order, which are not uniform at the end of a run.
    last_says_so = int(run[-1].hash[32:], 16) % shard.target_sources == 0
    return len(run) >= shard.max_sources or (len(run) >= shard.min_sources and last_says_so)


def _plan(root: int, split: str, run: list[_Placed], recipe_digest: str) -> ShardPlan:
    sources = tuple(placed.source for placed in run)
    # Where a source lies does not matter, nor how it is reached: only what it is.
    listing = [(s.path, s.size, s.version, s.duplicate, s.lr_version, s.problem) for s in sources]
    work = json.dumps([FORMAT_VERSION, recipe_digest, ALGORITHM_VERSION, root, split, listing])
    leading = int(run[0].place[:16], 16) * 10**10 >> 64
    number = f"{root:03d}{leading:010d}" + (f"{run[0].position:012d}" if sources[0].container else "")
    return ShardPlan(root, split, number, hashlib.sha256(work.encode()).hexdigest(), sources)
