"""Which sources make which shard: a pure function of the listing and the recipe.

Within one `--source` and split, sources are ordered by the SHA-256 of their names (content-defined chunking): a shard
ends after a source whose hash is divisible by the target size, within the minimum and maximum. Adding a source rewrites
the shard it falls into, or cuts it in two. Sources inside one file (a tar, a Parquet table) stay together in order.

A listing of any length is planned in bounded memory: it is sorted through temporary files.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

from deedsr.dataset.manifest import FORMAT_VERSION, ShardEntry
from deedsr.dataset.recipe import ALGORITHM_VERSION, Recipe, Shard, Split
from pipelines.shards.source import Source
from pipelines.storage.lock import scratch_folder

_IN_MEMORY = 200_000  # sources held before they go to files


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
    if split.validation_patterns:
        validates = any(fnmatchcase(source.path, pattern) for pattern in split.validation_patterns)
    else:
        validates = int.from_bytes(hash[8:16]) < split.validation_share * 2**64
    name = "validation" if validates else "train"
    return _Placed(source.root, name, place.hex(), position, hash.hex(), source)


def _hash(root: int, path: str) -> bytes:
    # Names of files need not be valid Unicode; such a source is rejected later, and must have a place until then.
    return hashlib.sha256(f"{root}\n{path}".encode(errors="surrogateescape")).digest()


def _sorted(sources: Iterable[Source], split: Split, folder: Path) -> Iterator[_Placed]:
    """Every source in its place; many are sorted in runs, which are merged from files below `folder`."""
    rest = (_placed(source, split) for source in sources)
    files: list[Path] = []
    run = sorted(islice(rest, _IN_MEMORY))
    while len(run) == _IN_MEMORY:
        files.append(folder / str(len(files)))
        with files[-1].open("wb") as file:
            file.writelines(json.dumps(placed).encode() + b"\n" for placed in run)
        run.clear()  # before the next one is held
        run = sorted(islice(rest, _IN_MEMORY))
    return heapq.merge(run, *map(_read, files))


def _read(run: Path) -> Iterator[_Placed]:
    with run.open("rb") as lines:
        for line in lines:
            *place, source = json.loads(line)
            yield _Placed._make([*place, Source(*source)])


def _cut(ordered: Iterable[_Placed], shard: Shard) -> Iterator[list[_Placed]]:
    run: list[_Placed] = []
    for placed in ordered:
        run.append(placed)
        # Other bytes of the hash than those that define the order, which are not uniform at the end of a run.
        divisible = int(placed.hash[32:], 16) % shard.target_sources == 0
        if len(run) >= shard.max_sources or (len(run) >= shard.min_sources and divisible):
            yield run
            run = []
    if run:
        yield run


def _plan(root: int, split: str, run: list[_Placed], recipe_digest: str) -> ShardPlan:
    sources = tuple(placed.source for placed in run)
    # Where a source lies does not matter, nor how it is reached: only what it is.
    listing = [(s.path, s.size, s.version, s.duplicate, s.lr_version, s.problem) for s in sources]
    work = json.dumps([FORMAT_VERSION, recipe_digest, ALGORITHM_VERSION, root, split, listing])
    leading = int(run[0].place[:16], 16) * 10**10 >> 64
    number = f"{root:03d}{leading:010d}" + (f"{run[0].position:012d}" if sources[0].container else "")
    return ShardPlan(root, split, number, hashlib.sha256(work.encode()).hexdigest(), sources)
