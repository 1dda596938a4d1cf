"""One picture of a `--source` and its bytes: a file, a member of a tar, or a row of a Parquet table."""

import os
import posixpath
import tarfile
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from deedsr.dataset.pictures import RejectedImage
from deedsr.errors import DeeDSRError, UsageError
from pipelines.storage import is_hidden, object_at, open_storage, require_here

DECODED = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
# Formats that are not read are listed all the same: what was given and left out is recorded, with the reason.
_PICTURES = (
    *DECODED,
    *(".jpe", ".jfif", ".gif", ".bmp", ".dib", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jpf", ".jpx", ".jxl"),
    *(".psd", ".tga", ".exr", ".hdr", ".pfm", ".ppm", ".pgm", ".pbm", ".pnm", ".svg", ".ico", ".dng", ".cr2", ".cr3"),
    *(".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
)


class Source(NamedTuple):
    """One picture. `root` is the ordinal of its `--source`, `path` its name below it: what a sample is named after.

    A picture inside a tar or a Parquet table has that file's name as the first part of its `path`, and that file's size
    and version as its `version`: the file is the unit of change.
    """

    root: int
    path: str
    uri: str  # where it lies now: itself, or the file that holds it
    size: int  # bytes; 0 for a row of a Parquet table
    version: str  # changes with the content: modification time or ETag
    container: str = ""  # relative path of the tar or Parquet table that holds it, or names it
    offset: int = -1  # of its first byte in a tar
    row: int = -1  # in a Parquet table
    duplicate: bool = False  # another source with the same content comes first
    lr: str = ""  # where its real LR partner lies
    lr_version: str = ""  # size and version of that
    problem: str = ""  # why it is rejected, where the listing already shows it


def is_picture(path: str) -> bool:
    return path.lower().endswith(_PICTURES)


def read_source(source: Source) -> tuple[bytes, bytes | None]:
    """The picture and its real LR partner, if it has one.

    Raises FileNotFoundError if the picture is gone, RejectedImage with the reason where there is none to read.
    """
    if source.problem:
        raise RejectedImage(source.problem)
    with _permitted(source.uri, known=bool(source.version)):
        storage, name = object_at(source.uri)
        if source.row >= 0 and is_table(source.uri):  # else the row names a file
            data = read_row(source)
        elif source.offset >= 0:
            data = storage.read_range(name, source.offset, source.size) if source.size else b""
        else:
            data = storage.read(name)
    if not source.lr:
        return data, None
    storage, name = object_at(source.lr)
    with _permitted(source.lr, known=not source.lr_version.endswith("-")):
        try:
            return data, storage.read(name)
        except FileNotFoundError:
            raise RejectedImage("no LR partner") from None


@contextmanager
def _permitted(uri: str, known: bool) -> Iterator[None]:
    """Turns the error of a file that was unreadable when listed (no version) into its rejection.

    Other errors end the work: a storage that fails for a moment must not change the dataset, nor must a worker that
    does not have the folder.
    """
    try:
        yield
    except FileNotFoundError:
        if known:
            require_here(object_at(uri)[0].uri)
        raise
    except DeeDSRError:
        if known:
            raise
        raise RejectedImage("no permission to read it") from None


# What `tarfile` raises for headers that are none.
_TAR_DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, LookupError)


def list_tar(tar: Source) -> list[Source]:
    """Every picture of the tar at `tar.uri`, in its order; their paths are `tar.path` and their names as they are.

    Links and sparse files are no pictures, nor is `KEY.lr.EXT` beside a `KEY.hr.EXT`: degradation shards give their HR.
    A file that is not a whole tar comes first, as a source that is rejected; the members that are whole are used all
    the same. Of equal names the last counts, as in extracting; the others are rejected.
    """
    members: list[Source] = []
    last: dict[str, int] = {}  # place of each name
    problem = ""
    try:
        storage, name = object_at(tar.uri)
        with storage.open(name) as file:
            for member in _members(file):
                if not member.isreg() or member.issparse() or not is_picture(member.name) or is_hidden(member.name):
                    continue
                if member.name in last:
                    replaced = members[last[member.name]]
                    members[last[member.name]] = replaced._replace(problem="replaced by a later member of that name")
                last[member.name] = len(members)
                path = f"{tar.path}/{member.name}"
                members.append(tar._replace(path=path, size=member.size, offset=member.offset_data))
    except FileNotFoundError:
        problem = "no such file"
    except _TAR_DAMAGE:
        problem = "not a whole tar file"
    degraded = {f"{tar.path}/{name}" for name in _degraded(set(last))}
    broken = [tar._replace(problem=problem)] if problem else []
    return broken + [member for member in members if member.path not in degraded]


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Whole members. Raises `_TAR_DAMAGE` where the tar is cut off, ends without a mark or goes on behind it."""
    size = file.seek(0, 2)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        end = 0
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else all headers are held
            if member.offset_data + member.size > size or tar.offset <= end:
                raise tarfile.ReadError("cut off")
            end = tar.offset
            yield member
        file.seek(tar.offset)
        rest = file.read(tarfile.RECORDSIZE)
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            raise tarfile.ReadError("no end mark, or another tar behind it")


def _degraded(names: set[str]) -> Iterator[str]:
    hr = {name.rpartition(".hr.")[0] for name in names if ".hr." in name}
    return (name for name in names if ".lr." in name and name.rpartition(".lr.")[0] in hr)


_BYTES = ("image", "bytes", "data", "content", "jpg", "jpeg", "png", "webp")
_URIS = ("url", "uri", "path", "image_path", "file_name")
_BATCH = 16  # rows decoded at a time: photographs, some MB each
_BUFFER = 1 << 20  # bytes read at a time, instead of a whole row group
_NO_IMAGE = "no image in this row"
_NO_URI = "neither a path nor an s3:// URI"
_BROKEN_TABLE = "not a whole Parquet file"
# What pyarrow raises for bytes that are no table, or no text where text should be.
_DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, StopIteration)

_opened = threading.local()  # the table that this thread read last


class NoPictures(UsageError):
    """A table without a column of pictures."""


class _Column(NamedTuple):
    name: str
    read: str  # what of it is read: of Hugging Face's {bytes, path} the bytes
    is_uri: bool


def is_table(uri: str) -> bool:
    return uri.lower().endswith(".parquet")


def list_table(table: Source, follow: bool) -> Iterable[Source]:
    """A source for each row of the Parquet table at `table.uri`, called by `table.path` and the row's number.

    Pictures are in the first column called image, bytes, data, content, jpg, jpeg, png or webp that holds bytes, or
    structs of them as Hugging Face's datasets do. Else, if `follow`, the first column of strings called url, uri, path,
    image_path or file_name says where they lie, relative to the table's folder. Only the footer is read in the first
    case, only that column in the second. A file that is not a whole table is a source itself, which is rejected. Raises
    NoPictures where there is no such column.
    """
    try:
        with _open(table.uri) as parquet:
            rows, column = _starts(parquet)[-1], _column(parquet.schema_arrow)
            columns = ", ".join(f"{field.name} ({field.type})" for field in parquet.schema_arrow)
    except FileNotFoundError:
        return [table._replace(problem="no such file")]
    except _DAMAGE:
        return [table._replace(problem=_BROKEN_TABLE)]
    if column is None:
        raise NoPictures(
            f"{table.uri} has no column of pictures: bytes called {', '.join(_BYTES)}, or strings called "
            f"{', '.join(_URIS)}; its columns are {columns}"
        )
    if not column.is_uri:
        return (_row(table, row) for row in range(rows))
    if not follow:
        raise NoPictures(
            f"{table.uri} names pictures elsewhere, in its column {column.name}: to use them, give the table itself "
            "(or FOLDER/*.parquet) as a source"
        )
    return _named(table, column)


def read_row(source: Source) -> bytes:
    """The picture in one row. Raises RejectedImage if there is none, FileNotFoundError if the table is gone.

    Cheap for rows that come in order: the table stays open, and is read forward.
    """
    where = (source.uri, source.version)
    try:
        if getattr(_opened, "where", None) != where:
            _opened.where = None
            _opened.rows = _Rows(source.uri)
            _opened.where = where
        data = _opened.rows.read(source.row)
    except FileNotFoundError:
        raise
    except _DAMAGE:
        _opened.where = None
        raise RejectedImage("the Parquet table is damaged here") from None
    if data is None:
        raise RejectedImage(_NO_IMAGE)
    return data


def _row(table: Source, row: int) -> Source:
    return table._replace(path=f"{table.path}/{row:010d}", size=0, row=row)


def _named(table: Source, column: _Column) -> Iterator[Source]:
    folder = posixpath.dirname(table.uri)
    row = 0
    try:
        with _open(table.uri) as parquet:
            for group in range(parquet.num_row_groups):  # one by one: rows before a damaged group are used
                for batch in parquet.iter_batches(row_groups=[group], columns=[column.read], use_threads=False):
                    for target in batch.column(0).to_pylist():
                        yield _target(_row(table, row), target, folder)
                        row += 1
    except _DAMAGE:
        yield table._replace(problem=_BROKEN_TABLE)


def _target(source: Source, target: str | None, folder: str) -> Source:
    if not target or not target.strip():
        return source._replace(problem=_NO_IMAGE)
    there = folder.startswith("s3://")  # a table of a bucket names nothing on this machine
    if there and (target.startswith("/") or not target.startswith("s3://") and "://" in target):
        return source._replace(problem=_NO_URI)
    try:
        uri = open_storage(target if "://" in target else posixpath.join(folder, target)).uri
    except UsageError:
        return source._replace(problem=_NO_URI)
    # Names that no storage has, `data:image/jpeg;base64,...` among them: asking for one is an error of its own kind.
    longest = 1024 if "://" in uri else 255
    if "\0" in uri or any(len(part) > longest for part in os.fsencode(uri).split(b"/")):
        return source._replace(problem=_NO_URI)
    if is_table(uri):  # `read_source` would look for the row there
        return source._replace(problem="not a picture")
    ext = posixpath.splitext(uri)[1]
    return source._replace(path=source.path + ext, uri=uri)


def _open(uri: str) -> pyarrow.parquet.ParquetFile:
    storage, name = object_at(uri)
    # Without the buffer, all of a row group's pictures would be in memory at once.
    return pyarrow.parquet.ParquetFile(storage.open(name), pre_buffer=False, buffer_size=_BUFFER)


def _starts(parquet: pyarrow.parquet.ParquetFile) -> list[int]:
    """First row of each row group, and the number of rows. Raises ValueError if the footer contradicts itself."""
    groups = range(parquet.num_row_groups)
    starts = [0, *accumulate(parquet.metadata.row_group(group).num_rows for group in groups)]
    if starts[-1] != parquet.metadata.num_rows or sorted(starts) != starts:
        raise ValueError("row groups don't add up")
    return starts


def _column(schema: pa.Schema) -> _Column | None:
    fields = {field.name.lower(): field for field in reversed(list(schema))}
    for name in _BYTES:
        if (field := fields.get(name)) is None:
            continue
        if _kind(field.type) == "binary":
            return _Column(field.name, field.name, False)
        parts = field.type.fields if pa.types.is_struct(field.type) else ()
        if any(part.name == "bytes" and _kind(part.type) == "binary" for part in parts):
            return _Column(field.name, f"{field.name}.bytes", False)
    for name in _URIS:
        if (field := fields.get(name)) is not None:
            plain = field.type.value_type if pa.types.is_dictionary(field.type) else field.type  # of pandas' categories
            if _kind(plain) == "string":
                return _Column(field.name, field.name, True)
    return None


def _kind(type: pa.DataType) -> str:
    """`binary` and `string` also for the types of long and of viewed values."""
    return str(type).removeprefix("large_").removesuffix("_view")


class _Rows:
    """The rows of an open table, a few of them decoded."""

    def __init__(self, uri: str):
        self._parquet = _open(uri)
        column = _column(self._parquet.schema_arrow)
        if column is None or column.is_uri:
            raise LookupError("another table than the one that was listed")
        self._column = column.read
        self._starts = _starts(self._parquet)
        self._group = -1
        self._first = self._end = 0  # the rows that are decoded
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._decoded: pa.Array = []

    def read(self, row: int) -> bytes | None:
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._first:
            self._batches = self._parquet.iter_batches(
                _BATCH, row_groups=[group], columns=[self._column], use_threads=False
            )
            self._group, self._first, self._end = group, self._starts[group], self._starts[group]
        while row >= self._end:
            self._decoded = next(self._batches).column(0)
            self._first, self._end = self._end, self._end + len(self._decoded)
        value = self._decoded[row - self._first].as_py()
        return value["bytes"] if isinstance(value, dict) else value
