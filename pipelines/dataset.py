"""Reading a finished dataset: its manifest, its index, and single samples through their offsets in the shards."""

import contextlib
import hashlib
import io
import json
import posixpath
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from deedsr.dataset.codecs import decode_stored
from deedsr.dataset.manifest import MANIFEST, SAMPLES, Manifest, kept_copy
from deedsr.degradation.recipe import Recipe
from deedsr.errors import DatasetNotCommitted, DeeDSRError
from pipelines.storage import Storage, open_storage

__all__ = ["Dataset", "LRSample", "Sample"]


class Sample(NamedTuple):
    """`hr` and `lr`: uint8 RGB, (height, width, 3), the HR `scale` times the LR; `info`: the sample's KEY.json."""

    key: str
    hr: np.ndarray
    lr: np.ndarray
    info: dict[str, Any]


class LRSample(NamedTuple):
    """A sample without its HR."""

    key: str
    lr: np.ndarray
    info: dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """A dataset whose generation finished."""

    storage: Storage
    manifest: Manifest

    @classmethod
    def open(cls, uri: str) -> "Dataset":
        """The dataset at a directory or S3 prefix. Raises DatasetNotCommitted if there is no manifest."""
        storage = open_storage(uri)
        try:
            data = storage.read(MANIFEST)
        except FileNotFoundError:
            raise DatasetNotCommitted(storage.uri) from None
        return cls(storage, Manifest.from_json(data, f"{storage.uri}/{MANIFEST}"))

    @property
    def uri(self) -> str:
        return self.storage.uri

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe.model_validate(self.manifest.recipe)

    @property
    def scale(self) -> int:
        return self.recipe.scale

    def hr_dataset(self) -> "Dataset":
        """The dataset that holds the HR images: itself, or the one that it names.

        Raises DeeDSRError if that one is gone, or another one lies in its place.
        """
        source = self.manifest.hr_from
        if source is None:
            return self
        where = source.uri if "://" in source.uri or source.uri.startswith("/") else self._beside(source.uri)
        remedy = f"put it there, or name its place: deedsr shards --hr-from PLACE --out {self.uri} with the same recipe"
        try:
            found = Dataset.open(where)
        except DatasetNotCommitted:
            raise DeeDSRError(f"{self.uri} takes its HR from {where}, which is not there: {remedy}") from None
        if found.manifest.hr_from is not None or found.recipe.formats.hr != self.recipe.formats.hr:
            raise DeeDSRError(f"{self.uri} takes its HR from {where}, where another dataset lies: {remedy}")
        return found

    def _beside(self, relative: str) -> str:
        scheme, separator, path = self.uri.rpartition("://")
        return scheme + separator + posixpath.normpath(posixpath.join(path, relative))

    @cached_property
    def _hr_storage(self) -> Storage:
        return self.hr_dataset().storage

    def file(self, name: str) -> bytes:
        """`samples.parquet` or `rejected.jsonl` as the manifest has it. Raises DeeDSRError if it is gone or altered."""
        sha256 = self.manifest.files[name]
        for path in (name, kept_copy(name, sha256)):
            with contextlib.suppress(FileNotFoundError):
                data = self.storage.read(path)
                if hashlib.sha256(data).hexdigest() == sha256:
                    return data
        raise DeeDSRError(f"{self.uri}/{name} is missing or altered: generate the dataset again, it reuses the shards")

    @cached_property
    def _samples(self) -> pa.Table:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(io.BytesIO(self.file(SAMPLES)))

    def index(self, split: str | None = None) -> pa.Table:
        """Rows of `samples.parquet`, of one split or of all, in shard order; variants of one content are adjacent."""
        if split is None:
            return self._samples
        return self._samples.filter(pa.compute.equal(self._samples["split"], split))

    def read(self, table: pa.Table, row: int) -> Sample:
        """The sample in row `row` of an index. One range of a shard is read, or two if the HR is another dataset's."""
        shard, hr_shard = (table[name][row].as_py() for name in ("shard", "hr_shard"))
        if shard == hr_shard:
            key, (hr, lr, info) = self._members(table, row, ("hr", "lr", "json"))
        else:
            key, (hr,) = self._members(table, row, ("hr",), self._hr_storage, hr_shard)
            key, (lr, info) = self._members(table, row, ("lr", "json"))
        return Sample(key, self._decode(hr, key), self._decode(lr, key), json.loads(info))

    def read_lr(self, table: pa.Table, row: int) -> LRSample:
        """The same without the HR, which is neither read nor decoded."""
        key, (lr, info) = self._members(table, row, ("lr", "json"))
        return LRSample(key, self._decode(lr, key), json.loads(info))

    def _decode(self, data: bytes, key: str) -> np.ndarray:
        try:
            return decode_stored(data)
        except ValueError:
            raise DeeDSRError(f"{self.uri}: sample {key} is damaged: run `deedsr verify {self.uri}`") from None

    def _members(
        self,
        table: pa.Table,
        row: int,
        members: tuple[str, ...],
        storage: Storage | None = None,
        shard: str | None = None,
    ) -> tuple[str, list[bytes]]:
        key, shard, storage = table["key"][row].as_py(), shard or table["shard"][row].as_py(), storage or self.storage
        spans = [(table[f"{name}_offset"][row].as_py(), table[f"{name}_size"][row].as_py()) for name in members]
        (start, _), (last, size) = spans[0], spans[-1]  # a sample's members lie one after the other
        length = last + size - start
        try:
            data = storage.read_range(shard, start, length)
        except FileNotFoundError:
            raise DeeDSRError(f"{storage.uri}/{shard} is missing: run `deedsr verify {storage.uri}`") from None
        if len(data) != length:
            raise DeeDSRError(f"{storage.uri}/{shard} ends before sample {key}: run `deedsr verify {storage.uri}`")
        return key, [data[offset - start : offset - start + size] for offset, size in spans]
