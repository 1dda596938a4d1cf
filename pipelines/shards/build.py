"""One shard of sources: read, make samples, tar; then the record that commits it. A function of its plan."""

import hashlib
import logging
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from deedsr.dataset.manifest import STATE
from deedsr.dataset.pictures import RejectedImage
from deedsr.dataset.recipe import Recipe
from deedsr.dataset.worker import prepare_worker
from deedsr.errors import DeeDSRError
from pipelines.shards.pieces import in_order
from pipelines.shards.plan import ShardPlan
from pipelines.shards.record import COLUMNS, ShardRecord, table_of, tar_name, write_record
from pipelines.shards.samples import Draft, Drafts, Share, rejection, samples_of
from pipelines.shards.source import Source, is_table, read_source
from pipelines.shards.tar import ShardTar
from pipelines.storage import Storage
from pipelines.storage.lock import scratch_folder

__all__ = ["FromSources", "ShardDraft", "ShardWork"]

logger = logging.getLogger(__name__)
ATTEMPTS = f"{STATE}/attempts"
_LIVES = 2  # a source that kills so many processes is left out
_DECODING = 2  # samples that take the time of reading and decoding their source, which each of its pieces does again


class ShardWork(Protocol):
    """What turns plans into shards. Pickles: it travels to the workers."""

    def build(self, plan: ShardPlan, out: Storage, cpus: int = 1) -> ShardRecord:
        """Writes the tar of a plan, then its record. Equal plan, equal bytes, wherever and whenever.

        `cpus`: those of the cluster that the work may use at a time; it may leave them.
        """


class ShardDraft:
    """A shard while it is written: a temporary tar, and what its record will say."""

    def __init__(self, plan: ShardPlan, file: Path, tar: ShardTar, columns: pa.Schema):
        self.plan, self._file, self._tar, self._columns = plan, file, tar, columns
        self.sources: list[tuple[str, str | None]] = []
        self.rejected: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []

    def add(self, draft: Draft, uri: str | None) -> None:
        """Appends a sample; `uri` is where its source lies."""
        row = {
            **draft.row,
            "split": self.plan.split,
            "source_uri": uri and uri.encode(errors="backslashreplace").decode(),  # a folder's name need not be Unicode
        }
        key = row["key"]
        for member, data in draft.members.items():
            extension = member if member == "json" else f"{member}.{row[f'{member}_ext']}"
            row[f"{member}_offset"], row[f"{member}_size"] = self._tar.add(key, extension, data), len(data)
        self._rows.append(row)

    def commit(self, out: Storage) -> ShardRecord:
        """Puts the tar in place, then the record."""
        if not self._rows:
            record = ShardRecord("", "", 0, 0, self.sources, table_of([], self._columns), self.rejected)
        else:
            sha256 = self._tar.finish()
            name = tar_name(self.plan, sha256)
            rows = table_of(({"hr_shard": name, **row, "shard": name} for row in self._rows), self._columns)
            out.write(name, self._file)
            record = ShardRecord(name, sha256, self._tar.size, len(self._rows), self.sources, rows, self.rejected)
        write_record(self.plan, record, out)
        return record


@contextmanager
def shard_draft(plan: ShardPlan, columns: pa.Schema = COLUMNS) -> Iterator[ShardDraft]:
    prepare_worker()
    with (
        scratch_folder() as folder,
        (folder / "shard.tar").open("wb") as file,
        closing(ShardTar(file)) as tar,
    ):
        yield ShardDraft(plan, Path(file.name), tar, columns)


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
        with shard_draft(plan) as draft, self._each(pieces, plan, out, cpus) as each:
            for source, cut in zip(plan.sources, cuts, strict=True):
                drafts = _joined(source, list(islice(each, cut)))
                draft.sources.append((source.path, drafts.sha256))
                draft.rejected += drafts.rejected
                for sample in drafts.samples:
                    draft.add(sample, source.uri)
            record = draft.commit(out)
        out.delete(f"{ATTEMPTS}/{plan.id}")
        return record

    @contextmanager
    def _each(self, pieces: Iterator["_Piece"], plan: ShardPlan, out: Storage, cpus: int) -> Iterator[Iterator[Drafts]]:
        """What each piece gives."""
        attempt = f"{ATTEMPTS}/{plan.id}"
        tried = out.exists(attempt)
        if not tried:
            out.write(attempt, b"")
        with _guarded(self.samples) if tried else nullcontext(self.samples) as samples:
            here = lambda piece: _drafts(piece, self.recipe, samples)
            yield in_order(self._make, pieces, cpus, here=here, guarded=self._make_guarded)

    def _make(self, piece: "_Piece") -> Drafts:
        return _drafts(piece, self.recipe, self.samples)

    def _make_guarded(self, piece: "_Piece") -> Drafts:
        with _guarded(self.samples) as samples:
            return _drafts(piece, self.recipe, samples)


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
    """`samples` in a process of its own, for sources of which one may have killed a worker.

    Only the death of that process counts against a source: whoever kills workers from outside harms none.
    """
    pool: ProcessPoolExecutor | None = None

    def make(source: Source, data: bytes, lr_data: bytes | None, recipe: Recipe, share: Share) -> Drafts:
        nonlocal pool
        for _ in range(_LIVES):
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


def _drafts(piece: _Piece, recipe: Recipe, make: MakeSamples) -> Drafts:
    source, share, content = piece
    content = content or _read(source)
    if isinstance(content, RejectedImage):
        return Drafts(None, [], [rejection(source, str(content))])
    return make(source, *content, recipe, share)


def _read(source: Source) -> Content:
    try:
        if source.duplicate:
            raise RejectedImage("the same content as an earlier source")
        try:
            source.path.encode()
        except UnicodeEncodeError:
            raise RejectedImage("file name is not valid UTF-8") from None
        try:
            return read_source(source)
        except FileNotFoundError:
            raise RejectedImage("no such file") from None
    except RejectedImage as reason:
        return reason


def _joined(source: Source, shares: list[Drafts]) -> Drafts:
    """A source's drafts from those of its shares, of which one that rejects the source decides."""
    for drafts in shares:
        if any(row["kind"] == "source" for row in drafts.rejected):
            return drafts
        if drafts.sha256 != shares[0].sha256:
            raise DeeDSRError(f"{source.uri} changed while it was read: run the same command again")
    return shares[0]._replace(samples=[sample for drafts in shares for sample in drafts.samples])
