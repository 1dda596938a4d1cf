"""What commits a shard: one Arrow file whose name says what it vouches for, written after the tar is in place."""

import io
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from deedsr.dataset.manifest import STATE
from deedsr.degradation.draws import SCALAR_COLUMNS
from pipelines.shards.plan import ShardPlan
from pipelines.storage import Storage

__all__ = ["COLUMNS", "LATENTS_COLUMNS", "Inventory", "ShardRecord", "read_record", "write_record"]

# The columns of `samples.parquet`.
COLUMNS = pa.schema(
    [("key", pa.string()), ("content", pa.string()), ("variant", pa.int32()), ("split", pa.string())]
    + [("shard", pa.string()), ("root", pa.int32()), ("source", pa.string()), ("source_uri", pa.string())]
    + [("source_sha256", pa.string())]
    + [(name, pa.int32()) for name in ("top", "left", "height", "width")]
    + [("flip", pa.bool_()), ("rotate", pa.int32()), ("stratum", pa.string()), ("degradation_group", pa.int32())]
    # The HR lies in the same shard, or in one of the dataset that the manifest's `hr_from` names.
    + [("hr_shard", pa.string()), ("hr_ext", pa.string()), ("hr_offset", pa.int64()), ("hr_size", pa.int64())]
    + [("lr_ext", pa.string()), ("lr_offset", pa.int64()), ("lr_size", pa.int64())]
    + [("json_offset", pa.int64()), ("json_size", pa.int64())]
    + [(name, pa.float64()) for name in SCALAR_COLUMNS]
)
# Of a dataset of latents, which holds no pixels but, where no learner was given, the LR.
LATENTS_COLUMNS = (
    pa.schema([column for column in COLUMNS if not column.name.startswith("hr_")])
    .append(pa.field("latents_offset", pa.int64()))
    .append(pa.field("latents_size", pa.int64()))
)
logger = logging.getLogger(__name__)
_FOLDER = f"{STATE}/shards"
_ABOUT = b"deedsr"
_NAME = re.compile(r"([0-9a-f]+)-([0-9a-f]+|none)-(\d+)\.arrow")  # plan, tar's SHA-256, bytes


@dataclass(frozen=True)
class ShardRecord:
    """`name` is empty, and there is no tar, if all sources were rejected.

    `sources`: [path, SHA-256 of the file or None if it could not be read] of each. `rows`: the shard's part of
    `samples.parquet`. `rejected`: its lines of `rejected.jsonl`.
    """

    name: str
    sha256: str
    bytes: int
    samples: int
    sources: list[tuple[str, str | None]]
    rows: pa.Table
    rejected: list[dict[str, Any]]


@dataclass(frozen=True)
class Inventory:
    """What an output holds, from one listing.

    `tars`: sizes by name. `records`: by id, what their names say: first 12 characters of the tar's SHA-256, its bytes.
    """

    tars: dict[str, int]
    records: dict[str, tuple[str, int]]

    @classmethod
    def of(cls, out: Storage) -> "Inventory":
        tars: dict[str, int] = {}
        records: dict[str, tuple[str, int]] = {}
        for entry in out.list():
            folder, _, name = entry.path.rpartition("/")
            if not folder and name.endswith(".tar"):
                tars[name] = entry.size
            elif folder == _FOLDER and name.endswith(".arrow"):
                if not (named := _NAME.fullmatch(name)):
                    logger.warning("%s/%s is no record of a shard, and left alone", out.uri, entry.path)
                    continue
                records[named[1]] = (named[2], int(named[3]))
        return cls(tars, records)

    def holds(self, plan: ShardPlan) -> bool:
        """Whether the shard is committed and its tar there in full size."""
        if plan.id not in self.records:
            return False
        hash, size = self.records[plan.id]
        return not size or self.tars.get(_tar(plan, hash)) == size

    def record(self, plan: ShardPlan) -> str:
        """Path of the shard's record."""
        return _path(plan, *self.records[plan.id])


def record_key(record: ShardRecord) -> tuple[str, int]:
    """What an inventory knows of a record."""
    return record.sha256[:12] or "none", record.bytes


def tar_name(plan: ShardPlan, sha256: str) -> str:
    return _tar(plan, sha256[:12])


def write_record(plan: ShardPlan, record: ShardRecord, out: Storage) -> None:
    about = {name: getattr(record, name) for name in ("name", "sha256", "bytes", "samples", "sources", "rejected")}
    table = record.rows.replace_schema_metadata({_ABOUT: json.dumps(about).encode()})
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    out.write(_path(plan, *record_key(record)), buffer.getvalue())


def read_record(path: str, out: Storage) -> ShardRecord:
    """Raises FileNotFoundError if the shard is not committed."""
    table = pa.ipc.open_file(pa.BufferReader(out.read(path))).read_all()
    about = json.loads(table.schema.metadata[_ABOUT])
    return ShardRecord(**about, rows=table.replace_schema_metadata(None))


def table_of(rows: Iterable[dict[str, Any]], columns: pa.Schema = COLUMNS) -> pa.Table:
    """Rows of `samples.parquet`; what a row lacks is null."""
    return pa.Table.from_pylist(list(rows), schema=columns)


def _path(plan: ShardPlan, hash: str, size: int) -> str:
    return f"{_FOLDER}/{plan.id}-{hash}-{size}.arrow"


def _tar(plan: ShardPlan, hash: str) -> str:
    return f"{plan.split}-{plan.number}-{hash}.tar"
