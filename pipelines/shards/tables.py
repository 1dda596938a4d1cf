"""Pictures in Parquet tables: a row holds the bytes of one, or names where it lies."""

import os
import posixpath
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet

from deedsr.dataset.pictures import RejectedImage
from deedsr.errors import UsageError
from pipelines.shards.source import Source
from pipelines.storage import open_storage, split_uri

__all__ = ["NoPictures", "is_table", "list_table", "read_row"]

_BYTES = ("image", "bytes", "data", "content", "jpg", "jpeg", "png", "webp")
_URIS = ("url", "uri", "path", "image_path", "file_name")
_BATCH = 16  # rows decoded at a time: photographs, some MB each
_BUFFER = 1 << 20  # bytes read at a time, instead of a whole row group
_NO_IMAGE = "no image in this row"
_NO_URI = "neither a path nor an s3:// URI"
_BROKEN = "not a whole Parquet file"
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
        return [table._replace(problem=_BROKEN)]
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
            for group in range(parquet.num_row_groups):  # one by one: what stands before a damaged one is used
                for batch in parquet.iter_batches(row_groups=[group], columns=[column.read], use_threads=False):
                    for target in batch.column(0).to_pylist():
                        yield _target(_row(table, row), target, folder)
                        row += 1
    except _DAMAGE:
        yield table._replace(problem=_BROKEN)


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
    folder, name = split_uri(uri)
    # Without the buffer, all of a row group's pictures would be in memory at once.
    return pyarrow.parquet.ParquetFile(open_storage(folder).open(name), pre_buffer=False, buffer_size=_BUFFER)


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
        if _is_binary(field.type):
            return _Column(field.name, field.name, False)
        if pa.types.is_struct(field.type) and any(
            part.name == "bytes" and _is_binary(part.type) for part in field.type.fields
        ):
            return _Column(field.name, f"{field.name}.bytes", False)
    for name in _URIS:
        if (field := fields.get(name)) is not None and _is_string(field.type):
            return _Column(field.name, field.name, True)
    return None


def _is_binary(type: pa.DataType) -> bool:
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type)


def _is_string(type: pa.DataType) -> bool:
    if pa.types.is_dictionary(type):  # of pandas' categories
        type = type.value_type
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)


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
