"""One shard from its plan: of sources, or of the samples of another dataset. A pure function of the plan."""

import hashlib
import io
import logging
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import BinaryIO, NamedTuple

import pyarrow.parquet

from deedsr.dataset.manifest import STATE
from deedsr.dataset.pictures import RejectedImage
from deedsr.dataset.recipe import Recipe
from deedsr.degradation.chain import prepare_worker
from deedsr.errors import DeeDSRError
from pipelines.data.dataset import decode_member, read_member
from pipelines.shards.execute import in_order
from pipelines.shards.plan import ShardPlan
from pipelines.shards.samples import Crop, Draft, Drafts, Row, Share, degraded, rejection, samples_of
from pipelines.shards.shard import ShardRecord, shard_draft
from pipelines.shards.source import Source, is_table, read_source
from pipelines.storage import Storage

logger = logging.getLogger(__name__)
ATTEMPTS = f"{STATE}/attempts"
_ATTEMPTS = 2  # processes that a source may kill before it is left out
_DECODING = 2  # cost of reading and decoding a source, in samples; each piece of a source does it again


MakeSamples = Callable[[Source, bytes, bytes | None, Recipe, Share], Drafts]


@dataclass(frozen=True)
class FromSources:
    """Shards of photographs."""

    recipe: Recipe
    samples: MakeSamples = samples_of

    def build(self, plan: ShardPlan, out: Storage, cpus: int = 1) -> ShardRecord:
        cuts = _cuts(plan.sources, self.recipe, cpus)
        pieces = (
            _Piece(source, Share(number, cut), _read(source) if cpus > 1 and is_table(source.uri) else None)
            for source, cut in zip(plan.sources, cuts, strict=True)
            for number in range(cut)
        )
        attempt = f"{ATTEMPTS}/{plan.id}"
        tried = out.exists(attempt)
        if not tried:
            out.write(attempt, b"")
        guard = _guarded(self.samples) if tried else nullcontext(self.samples)
        with shard_draft(plan) as draft, guard as samples:
            make, here = (partial(_drafts, self.recipe, function) for function in (self.samples, samples))
            each = in_order(make, pieces, cpus, here=here, guarded=self._make_guarded)
            for source, cut in zip(plan.sources, cuts, strict=True):
                drafts = _joined(source, list(islice(each, cut)))
                draft.sources.append((source.path, drafts.sha256))
                draft.rejected += drafts.rejected
                for sample in drafts.samples:
                    draft.add(sample, source.uri)
            record = draft.commit(out)
        out.delete(attempt)
        return record

    def _make_guarded(self, piece: "_Piece") -> Drafts:
        with _guarded(self.samples) as samples:
            return _drafts(self.recipe, samples, piece)


Content = tuple[bytes, bytes | None] | RejectedImage


class _Piece(NamedTuple):
    """A share of a source. `content`: what it holds, if it has been read."""

    source: Source
    share: Share
    content: Content | None


def _cuts(sources: tuple[Source, ...], recipe: Recipe, cpus: int) -> list[int]:
    """In how many pieces each source is made: the last ones, too few for all CPUs, in as many as take least time."""
    last = len(sources) % cpus

    def cut(source: Source) -> int:
        samples = recipe.crop.per_source * recipe.variants_of(source.path)
        time = lambda pieces: math.ceil(last * pieces / cpus) * (_DECODING + math.ceil(samples / pieces))
        return min(range(1, min(samples, cpus) + 1), key=time)

    whole = len(sources) - last
    return [1] * whole + [cut(source) for source in sources[whole:]]


@contextmanager
def _guarded(samples: MakeSamples) -> Iterator[MakeSamples]:
    """Runs `samples` in a separate process, for a shard that may have killed its worker before.

    A source is left out only if that process dies, so that workers killed from outside lose no source.
    """
    pool: ProcessPoolExecutor | None = None

    def make(source: Source, data: bytes, lr_data: bytes | None, recipe: Recipe, share: Share) -> Drafts:
        nonlocal pool
        for _ in range(_ATTEMPTS):
            pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=prepare_worker)
            try:
                return pool.submit(samples, source, data, lr_data, recipe, share).result()
            except BrokenProcessPool:
                pool = None
        logger.warning("source %s kills the process that reads it: left out", source.uri)
        return Drafts(hashlib.sha256(data).hexdigest(), [], [rejection(source, "kills its worker")])

    try:
        yield make
    finally:
        if pool is not None:
            pool.shutdown()


def _drafts(recipe: Recipe, make: MakeSamples, piece: _Piece) -> Drafts:
    source, share, content = piece
    content = content or _read(source)
    if isinstance(content, RejectedImage):
        return Drafts(None, [], [rejection(source, str(content))])
    return make(source, *content, recipe, share)


def _read(source: Source) -> Content:
    if source.duplicate:
        return RejectedImage("the same content as an earlier source")
    try:
        source.path.encode()
    except UnicodeEncodeError:
        return RejectedImage("file name is not valid UTF-8")
    try:
        return read_source(source)
    except FileNotFoundError:
        return RejectedImage("no such file")
    except RejectedImage as reason:
        return reason


def _joined(source: Source, shares: list[Drafts]) -> Drafts:
    """A source's drafts from those of its shares; rejected if one of them rejects the source."""
    for drafts in shares:
        if any(row["kind"] == "source" for row in drafts.rejected):
            return drafts
        if drafts.sha256 != shares[0].sha256:
            raise DeeDSRError(f"{source.uri} changed while it was read: run the same command again")
    return shares[0]._replace(samples=[sample for drafts in shares for sample in drafts.samples])


_PIECES_PER_CPU = 8  # of a shard
# Columns whose values follow from the place in the new shard.
PLACES = ("split", "shard", "hr_shard", "hr_offset", "hr_size", "lr_offset", "lr_size", "json_offset", "json_size")


@dataclass(frozen=True)
class FromHR:
    """LR images of the HR images that the dataset at `hr` holds. `index` is the path of its `samples.parquet`.

    Crops, flips and keys are that dataset's; `recipe` is its recipe with new degradations (`Recipe.degrading`).
    """

    recipe: Recipe
    hr: Storage
    index: str

    def build(self, plan: ShardPlan, out: Storage, cpus: int = 1) -> ShardRecord:
        rows: dict[str, Row] = {}
        for row in rows_of(plan.origin, self.hr, self.index):
            rows.setdefault(row["content"], row)  # its variants hold the same HR
        wanted = [(row, variant) for row in rows.values() for variant in range(self.recipe.variants_of(row["source"]))]
        size = -(-len(wanted) // (cpus * _PIECES_PER_CPU))
        pieces = (wanted[start : start + size] for start in range(0, len(wanted), size))
        with shard_draft(plan) as draft:
            for samples in in_order(self._make, pieces, cpus):
                for sample, uri in samples:
                    draft.add(sample, uri)
            return draft.commit(out)

    def _make(self, wanted: list[tuple[Row, int]]) -> list[tuple[Draft, str]]:
        """Samples, each with where its source lies. `wanted`: rows with the HR, and a variant of each."""
        made = []
        with Tars(self.hr) as tars:
            for _, group in groupby(wanted, key=lambda sample: sample[0]["content"]):
                variants = list(group)
                row = variants[0][0]
                place = [row[name] for name in ("top", "left", "height", "width")]
                crop = Crop(
                    row["content"], row["root"], row["source"], row["source_sha256"], place, row["flip"], row["rotate"]
                )
                hr = decode_member(member_of(tars, row, "hr"), row["key"], self.hr.uri)
                where = {name: row[name] for name in ("hr_shard", "hr_ext", "hr_offset", "hr_size")}
                for sample in degraded(crop, hr, self.recipe, (variant for _, variant in variants)):
                    made.append((Draft(sample.members, sample.row | where), row["source_uri"]))
        return made


@dataclass(frozen=True)
class Joined:
    """Self-contained pairs of a dataset at `lr` that takes its HR from the one at `hr`."""

    lr: Storage
    index: str  # path of the `samples.parquet` of `lr`
    hr: Storage

    def build(self, plan: ShardPlan, out: Storage, cpus: int = 1) -> ShardRecord:
        with shard_draft(plan) as draft, Tars(self.hr) as hrs, Tars(self.lr) as lrs:
            for row in rows_of(plan.origin, self.lr, self.index):
                members = {name: member_of(hrs if name == "hr" else lrs, row, name) for name in ("hr", "lr", "json")}
                draft.add(Draft(members, {k: v for k, v in row.items() if k not in PLACES}), row["source_uri"])
            return draft.commit(out)


def rows_of(shard: str, storage: Storage, index: str) -> Iterator[Row]:
    """A shard's rows of `samples.parquet`, of which only the row groups that can hold them are read."""
    with storage.open(index) as file:
        yield from pyarrow.parquet.read_table(file, filters=[("shard", "==", shard)]).to_pylist()


class Tars:
    """Reads parts of tars, which stay open: those of a shard lie in few tars, one after the other."""

    def __init__(self, storage: Storage):
        self.uri = storage.uri
        self._storage, self._name = storage, ""
        self._file: BinaryIO = io.BytesIO()

    def __enter__(self) -> "Tars":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        if path != self._name:
            file = self._storage.open(path)
            self._file.close()
            self._file, self._name = file, path
        self._file.seek(offset)
        return self._file.read(size)


def member_of(tars: Tars, row: Row, name: str) -> bytes:
    """A member of a sample: `hr`, `lr` or `json`."""
    return read_member(tars, row["hr_shard" if name == "hr" else "shard"], row[f"{name}_offset"], row[f"{name}_size"])
