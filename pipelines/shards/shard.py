"""One shard while it is written: a WebDataset tar, then the record that commits it; and what an output holds of them.

A record is an Arrow file whose name identifies what it commits, so that one listing finds the committed shards.
"""

import hashlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa

from deedsr.dataset.manifest import STATE
from deedsr.degradation.chain import prepare_worker
from deedsr.degradation.draws import SCALAR_COLUMNS
from pipelines.shards.plan import ShardPlan
from pipelines.shards.samples import Draft, Rejection, Row
from pipelines.storage import Storage, scratch_folder

logger = logging.getLogger(__name__)
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
    rejected: list[Rejection]


@dataclass(frozen=True)
class Inventory:
    """What an output holds, from one listing.

    `tars`: sizes by name. `records`: by id, from their names: first 12 characters of the tar's SHA-256, its bytes.
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
                    logger.warning("%s/%s is not a record of a shard and is ignored", out.uri, entry.path)
                    continue
                records[named[1]] = (named[2], int(named[3]))
        return cls(tars, records)

    def holds(self, plan: ShardPlan) -> bool:
        """Whether the shard is committed and its tar there in full size."""
        if plan.id not in self.records:
            return False
        hash, size = self.records[plan.id]
        return not size or self.tars.get(tar_name(plan, hash)) == size

    def record(self, plan: ShardPlan) -> str:
        """Path of the shard's record."""
        return _path(plan, *self.records[plan.id])


def record_key(record: ShardRecord) -> tuple[str, int]:
    """The part of a record that is in its name, see `Inventory.records`."""
    return record.sha256[:12] or "none", record.bytes


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


def _path(plan: ShardPlan, hash: str, size: int) -> str:
    return f"{_FOLDER}/{plan.id}-{hash}-{size}.arrow"


def tar_name(plan: ShardPlan, hash: str) -> str:
    return f"{plan.split}-{plan.number}-{hash}.tar"


class ShardTar:
    """`webdataset.TarWriter` on an open binary file, which is hashed as it is written.

    Headers carry no time, user, group or host, so equal members are equal bytes.
    """

    def __init__(self, file: IO[bytes]):
        from webdataset import TarWriter  # imports torch, which only a process that writes a shard need do

        self._stream = HashedFile(file)
        self._writer = TarWriter(self._stream, user="", group="", mode=0o444, mtime=0, encoder=False)

    @property
    def size(self) -> int:
        """Bytes in the file so far; of the whole archive once it is finished."""
        return self._stream.size

    def add(self, key: str, extension: str, data: bytes) -> int:
        """Appends the member `key.extension` and returns the offset of its first byte of data."""
        self._writer.write({"__key__": key, extension: data})
        blocks = -(-len(data) // tarfile.BLOCKSIZE)  # behind its header, which may take several
        return self._writer.tarstream.offset - blocks * tarfile.BLOCKSIZE

    def finish(self) -> str:
        """Writes the end of the archive, once, and returns the SHA-256 of the whole file, hexadecimal."""
        self._writer.close()
        self._stream.file.flush()
        return self._stream.sha256

    close = finish  # else an abandoned archive would write its buffer when it is garbage-collected


class HashedFile:
    """A file that counts and hashes what is written to it or read from it."""

    def __init__(self, file: IO[bytes]):
        self.file, self._hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._passed(data)
        return self.file.write(data)

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self._passed(data)
        return data

    def _passed(self, data: bytes) -> None:
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class ShardDraft:
    """A shard while it is written: a temporary tar and the content of its record."""

    def __init__(self, plan: ShardPlan, file: Path, tar: ShardTar, columns: pa.Schema):
        self.plan, self._file, self._tar, self._columns = plan, file, tar, columns
        self.sources: list[tuple[str, str | None]] = []
        self.rejected: list[Rejection] = []
        self._rows: list[Row] = []

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
            record = ShardRecord("", "", 0, 0, self.sources, self._columns.empty_table(), self.rejected)
        else:
            sha256 = self._tar.finish()
            name = tar_name(self.plan, sha256[:12])
            rows = [{"hr_shard": name, **row, "shard": name} for row in self._rows]
            table = pa.Table.from_pylist(rows, schema=self._columns)  # what a row lacks is null
            out.write(name, self._file)
            record = ShardRecord(name, sha256, self._tar.size, len(rows), self.sources, table, self.rejected)
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
