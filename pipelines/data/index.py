"""A dataset's index and its list of what was left out, read in pieces: memory does not grow with the dataset.

`Dataset.index` holds the whole table, which training needs. Whoever only looks at a dataset reads some columns of it,
batch by batch, and of a remote one nothing else is transferred.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from deedsr.dataset.manifest import REJECTED, SAMPLES, kept_copy
from deedsr.errors import DeeDSRError
from pipelines.data.dataset import Dataset

_CHUNK = 8 << 20  # bytes of one request where a file is read from end to end
_BATCH = 65_536  # rows
# Not needed to read a sample, and most of an index: the degradation's numbers, and where its source lay.
_DESCRIPTIVE = ("deg_", "source")


def _open(dataset: Dataset, name: str, read_ahead: int = 0) -> BinaryIO:
    """The file that the manifest refers to.

    The copy named after its hash is taken as it is, so that parts of it can be read alone; a file under its plain name
    may belong to another manifest and is hashed first.
    """
    sha256 = dataset.manifest.files[name]
    with contextlib.suppress(FileNotFoundError):
        return dataset.storage.open(kept_copy(name, sha256), read_ahead)
    with contextlib.suppress(FileNotFoundError):
        file, found = dataset.storage.open(name, read_ahead), hashlib.sha256()
        while chunk := file.read(_CHUNK):
            found.update(chunk)
        if found.hexdigest() == sha256:
            file.seek(0)
            return file
    raise dataset.altered(name)


class LeftOut(NamedTuple):
    """A line of `rejected.jsonl`: `kind` is `source` or `crop`, `source` the path below its `--source`."""

    kind: str
    source: str
    reason: str


def left_out(dataset: Dataset) -> Iterator[LeftOut]:
    """What was left out, in order. Raises DeeDSRError, at the end at the latest, if the list was altered."""
    found = hashlib.sha256()
    try:
        for line in _open(dataset, REJECTED, _CHUNK):
            found.update(line)
            content = json.loads(line)
            yield LeftOut(content["kind"], content["source"], content["reason"])
    except (ValueError, KeyError, TypeError) as error:
        raise dataset.altered(REJECTED) from error
    if found.hexdigest() != dataset.manifest.files[REJECTED]:
        raise dataset.altered(REJECTED)


class SampleIndex:
    """`samples.parquet` by columns and parts (row groups). Raises DeeDSRError where it is missing or altered."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        with self._explained():
            self._file = pyarrow.parquet.ParquetFile(_open(dataset, SAMPLES), pre_buffer=True)
            self.columns: list[str] = self._file.schema_arrow.names
            metadata = self._file.metadata
            sizes = [metadata.row_group(part).num_rows for part in range(metadata.num_row_groups)]
        if sum(sizes) != dataset.manifest.samples:
            raise dataset.altered(SAMPLES)
        stops = [sum(sizes[: part + 1]) for part in range(len(sizes))]
        self.parts = [range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]  # rows of each

    def batches(self, columns: Sequence[str], parts: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        """Some columns of some parts (None: all), in order."""
        for part in range(len(self.parts)) if parts is None else parts:
            # One part at a time: what pyarrow reads ahead, it keeps until the next call.
            with self._explained():
                yield from self._file.iter_batches(_BATCH, row_groups=[part], columns=list(columns))

    def extremes(self, column: str) -> tuple[float, float] | None:
        """Least and greatest value of a column of numbers, from the statistics in the file; None if it has no value."""
        number = self._file.schema.names.index(column)
        found = [self._file.metadata.row_group(part).column(number).statistics for part in range(len(self.parts))]
        found = [statistics for statistics in found if statistics is not None and statistics.has_min_max]
        return (min(s.min for s in found), max(s.max for s in found)) if found else None

    def rows(self, rows: Sequence[int], columns: Sequence[str] = ()) -> pa.Table:
        """The rows of these numbers, in rising order: some columns, or what `Dataset.read` needs of them."""
        columns = columns or [name for name in self.columns if not name.startswith(_DESCRIPTIVE)]
        wanted, found = sorted(rows), []
        for part, numbers in enumerate(self.parts):
            if inside := [row - numbers.start for row in wanted if row in numbers]:
                with self._explained():
                    found.append(self._file.read_row_group(part, list(columns)).take(inside))
        return pa.concat_tables(found)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise self._dataset.altered(SAMPLES) from error


def require_hr(dataset: Dataset) -> None:
    """Raises DeeDSRError if HR images that the dataset takes from another one are gone since that was generated anew.

    Reads the column `hr_shard` only if the HR dataset has changed.
    """
    if dataset.manifest.hr_from is None:
        return
    hr = dataset.hr_dataset()
    if hr.digest == dataset.manifest.hr_from.digest:
        return
    there = {shard.name for shard in hr.manifest.shards}
    wanted: set[str] = set()
    for batch in SampleIndex(dataset).batches(["hr_shard"]):
        wanted.update(pa.compute.unique(batch["hr_shard"]).to_pylist())
    gone = [name for name in sorted(wanted - there) if not hr.storage.exists(name)]
    if gone:
        raise DeeDSRError(dataset.hr_is_gone(f"{len(gone)} of the {len(wanted)} shards with its HR are gone"))
