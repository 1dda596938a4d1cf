"""One shard of sources: read, make samples, tar; then the record that commits it. A function of its plan."""

import hashlib
import logging
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from deedsr.dataset.manifest import STATE
from deedsr.dataset.pictures import RejectedImage
from deedsr.dataset.tar import TarWriter
from deedsr.dataset.worker import prepare_worker
from deedsr.degradation.recipe import Recipe
from pipelines.shards.plan import ShardPlan
from pipelines.shards.record import COLUMNS, ShardRecord, table_of, tar_name, write_record
from pipelines.shards.samples import Draft, Drafts, samples_of
from pipelines.shards.sources import Source, read_source
from pipelines.storage import Storage

__all__ = ["FromSources", "ShardDraft", "ShardWork"]

logger = logging.getLogger(__name__)
ATTEMPTS = f"{STATE}/attempts"
_LIVES = 2  # a source that kills so many processes is left out


class ShardWork(Protocol):
    """What turns plans into shards. Pickles: it travels to the workers."""

    def build(self, plan: ShardPlan, out: Storage) -> ShardRecord:
        """Writes the tar of a plan, then its record. Equal plan, equal bytes, wherever and whenever."""


class ShardDraft:
    """A shard while it is written: a temporary tar, and what its record will say."""

    def __init__(self, plan: ShardPlan, file: Any, columns: pa.Schema):
        self.plan, self._file, self._tar, self._columns = plan, file, TarWriter(file), columns
        self.sources: list[tuple[str, str | None]] = []
        self.rejected: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []

    def add(self, draft: Draft, uri: str | None) -> None:
        """Appends a sample; `uri` is where its source lies."""
        row = {**draft.row, "split": self.plan.split, "source_uri": uri}
        key = row["key"]
        for member, data in draft.members.items():
            name = f"{key}.json" if member == "json" else f"{key}.{member}.{row[f'{member}_ext']}"
            row[f"{member}_offset"], row[f"{member}_size"] = self._tar.add(name, data), len(data)
        self._rows.append(row)

    def commit(self, out: Storage) -> ShardRecord:
        """Puts the tar in place, then the record."""
        if not self._rows:
            record = ShardRecord("", "", 0, 0, self.sources, table_of([], self._columns), self.rejected)
        else:
            sha256 = self._tar.finish()
            name = tar_name(self.plan, sha256)
            rows = table_of(({"hr_shard": name, **row, "shard": name} for row in self._rows), self._columns)
            out.write(name, Path(self._file.name))
            record = ShardRecord(name, sha256, self._tar.size, len(self._rows), self.sources, rows, self.rejected)
        write_record(self.plan, record, out)
        return record


@contextmanager
def shard_draft(plan: ShardPlan, columns: pa.Schema = COLUMNS) -> Iterator[ShardDraft]:
    prepare_worker()
    with tempfile.NamedTemporaryFile(prefix="deedsr-", suffix=".tar") as file:
        yield ShardDraft(plan, file, columns)


MakeSamples = Callable[[Source, bytes, bytes | None, Recipe], Drafts]


@dataclass(frozen=True)
class FromSources:
    """Shards of photographs."""

    recipe: Recipe
    samples: MakeSamples = samples_of

    def build(self, plan: ShardPlan, out: Storage) -> ShardRecord:
        attempt = f"{ATTEMPTS}/{plan.id}"
        tried = out.exists(attempt)
        if not tried:
            out.write(attempt, b"")
        with shard_draft(plan) as draft, _guarded(self.samples) if tried else nullcontext(self.samples) as make:
            for source in plan.sources:
                drafts = _drafts(source, self.recipe, make)
                draft.sources.append((source.path, drafts.sha256))
                draft.rejected += drafts.rejected
                for sample in drafts.samples:
                    draft.add(sample, source.uri)
            record = draft.commit(out)
        out.delete(attempt)
        return record


@contextmanager
def _guarded(samples: MakeSamples) -> Iterator[MakeSamples]:
    """`samples` in a process of its own, for a shard whose worker has died before, maybe of one of its sources.

    Only the death of that process counts against a source: whoever kills workers from outside harms none.
    """
    pool: ProcessPoolExecutor | None = None

    def make(source: Source, data: bytes, lr_data: bytes | None, recipe: Recipe) -> Drafts:
        nonlocal pool
        for _ in range(_LIVES):
            pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=prepare_worker)
            try:
                return pool.submit(samples, source, data, lr_data, recipe).result()
            except BrokenProcessPool:
                pool = None
        logger.warning("source %s kills the process that reads it: left out", source.uri)
        reason = {"kind": "source", "root": source.root, "source": source.path, "reason": "kills its worker"}
        return Drafts(hashlib.sha256(data).hexdigest(), [], [reason])

    try:
        yield make
    finally:
        if pool is not None:
            pool.shutdown()


def _drafts(source: Source, recipe: Recipe, make: MakeSamples) -> Drafts:
    try:
        if source.duplicate:
            raise RejectedImage("the same content as an earlier source")
        try:
            source.path.encode()
        except UnicodeEncodeError:
            raise RejectedImage("file name is not valid UTF-8") from None
        try:
            data, lr_data = read_source(source)
        except FileNotFoundError:
            raise RejectedImage("no such file") from None
        return make(source, data, lr_data, recipe)
    except RejectedImage as reason:
        rejection = {"kind": "source", "root": source.root, "source": source.path, "reason": str(reason)}
        return Drafts(None, [], [rejection])
