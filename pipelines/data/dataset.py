"""Reading a finished dataset: its manifest, its index, and single samples through their offsets in the shards."""

import contextlib
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, Self, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from deedsr.dataset.manifest import MANIFEST, SAMPLES, Manifest, kept_copy
from deedsr.dataset.members import Latents, decode_stored, unpack
from deedsr.dataset.recipe import Recipe, builtin_recipes
from deedsr.errors import DatasetNotCommitted, DeeDSRError, UsageError
from pipelines.storage import Storage, open_storage


def relative_place(uri: str, to: str) -> str:
    """`uri` as seen from `to`, if both are local or in one bucket; else as it is."""
    if "://" not in uri and "://" not in to:
        return os.path.relpath(uri, to)
    if uri.split("/")[:3] == to.split("/")[:3]:
        return posixpath.relpath(uri.partition("://")[2], to.partition("://")[2])
    return uri


class SourceInfo(TypedDict):
    """`root`: ordinal of the `--source`; `path`: below it; `sha256`: of the file."""

    root: int
    path: str
    sha256: str


class SampleInfo(TypedDict):
    """A sample's KEY.json. Nothing was drawn for a real pair: `seed` and `degradation` are None."""

    source: SourceInfo
    crop: list[int]  # top, left, height, width in source pixels
    flip: bool
    rotate: int  # degrees, counterclockwise, after flipping
    variant: int
    seed: int | None
    stratum: str | None
    degradation_group: int | None
    recipe_digest: str
    degradation: Any  # as of `deedsr.degradation.draws.draw_degradation`, None for a real pair


class Sample(NamedTuple):
    """`hr` and `lr`: uint8 RGB, (height, width, 3), the HR `scale` times the LR; `info`: the sample's KEY.json."""

    key: str
    hr: np.ndarray
    lr: np.ndarray
    info: SampleInfo


class LatentSample(NamedTuple):
    """A sample of a dataset of latents; `lr` (uint8 RGB) only where that holds no degradation vector."""

    key: str
    latents: Latents
    lr: np.ndarray | None


class Shards(Protocol):
    """Reads parts of shards; any `Storage` does."""

    uri: str

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end. Raises FileNotFoundError if there is no such shard."""


class MissingShard(DeeDSRError):
    """A shard that the manifest names is not there."""


def read_member(shards: Shards, shard: str, offset: int, size: int) -> bytes:
    """Part of a shard. Raises MissingShard if there is none, DeeDSRError if it ends before."""
    remedy = f"run `deedsr verify {shards.uri}`"
    try:
        data = shards.read_range(shard, offset, size)
    except FileNotFoundError:
        raise MissingShard(f"{shards.uri}/{shard} is missing: {remedy}") from None
    if len(data) != size:
        raise DeeDSRError(f"{shards.uri}/{shard} is cut off: {remedy}")
    return data


def decode_member(data: bytes, key: str, uri: str) -> np.ndarray:
    """The image in a member of sample `key`. Raises DeeDSRError for a damaged one."""
    try:
        return decode_stored(data)
    except ValueError:
        raise damaged(key, uri) from None


def damaged(key: str, uri: str) -> DeeDSRError:
    return DeeDSRError(f"{uri}: sample {key} is damaged: run `deedsr verify {uri}`")


@dataclass(frozen=True)
class Dataset:
    """A dataset whose generation finished.

    `through`: how the shards of a storage are read, for readers that keep files open or copies at hand.
    """

    storage: Storage
    manifest: Manifest
    through: Callable[[Storage, Manifest], Shards] | None = None

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

    @property
    def order_digest(self) -> str:
        """Digest that the order of samples in training follows from: latents come in the order of their pixels."""
        return self.manifest.latents.dataset if self.manifest.latents else self.digest

    def require_pixels(self, option: str = "this") -> Self:
        """The dataset itself. Raises UsageError if it holds latents; `option` names what needs pixels."""
        if self.manifest.latents is None:
            return self
        raise UsageError(
            f"{self.uri} holds latents, and {option} needs pixels: give the dataset that they were made of, "
            f"{self.located(self.manifest.latents.uri)}"
        )

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
        where = self.located(source.uri)
        remedy = f"put it there, or name its place: deedsr shards --hr-from PLACE --out {self.uri} with the same recipe"
        try:
            found = Dataset.open(where)
        except DatasetNotCommitted:
            raise DeeDSRError(f"{self.uri} takes its HR from {where}, which is not there: {remedy}") from None
        if found.manifest.hr_from is not None or found.recipe.formats.hr != self.recipe.formats.hr:
            raise DeeDSRError(f"{self.uri} takes its HR from {where}, where another dataset lies: {remedy}")
        return found

    def hr_is_gone(self, what: str) -> str:
        """Message for HR images that are missing because the HR dataset was generated again."""
        source = self.manifest.hr_from
        assert source
        hr = self.hr_dataset()
        return (
            f"{self.uri}: {what}: {hr.uri}, which holds the HR, was generated anew (digest {source.digest[:12]} became "
            f"{hr.digest[:12]}) and its older shards were removed by --gc: make these LR anew by `deedsr shards "
            f"--hr-from {hr.uri} --out {self.uri}` with their recipe, or the older HR from its sources and recipe"
        )

    def located(self, uri: str) -> str:
        """A place that the manifest names, which may be relative to the dataset (`relative_place`)."""
        if "://" in uri or uri.startswith("/"):
            return uri
        scheme, separator, path = self.uri.rpartition("://")
        return scheme + separator + posixpath.normpath(posixpath.join(path, uri))

    @cached_property
    def _shards(self) -> Shards:
        return self.through(self.storage, self.manifest) if self.through else self.storage

    @cached_property
    def _hr_shards(self) -> Shards:
        return replace(self.hr_dataset(), through=self.through)._shards

    def file(self, name: str) -> bytes:
        """`samples.parquet` or `rejected.jsonl` as the manifest has it. Raises DeeDSRError if it is gone or altered."""
        sha256 = self.manifest.files[name]
        for path in (name, kept_copy(name, sha256)):
            with contextlib.suppress(FileNotFoundError):
                data = self.storage.read(path)
                if hashlib.sha256(data).hexdigest() == sha256:
                    return data
        raise self.altered(name)

    def altered(self, name: str) -> DeeDSRError:
        return DeeDSRError(f"{self.uri}/{name} is missing or altered: generate the dataset again, it reuses the shards")

    @cached_property
    def _samples(self) -> pa.Table:
        return pyarrow.parquet.read_table(io.BytesIO(self.file(SAMPLES)))

    def index(self, split: str | None = None) -> pa.Table:
        """Rows of `samples.parquet`, of one split or of all, in shard order; variants of one content are adjacent."""
        if split is None:
            return self._samples
        return self._samples.filter(pa.compute.equal(self._samples["split"], split))

    def read(self, table: pa.Table, row: int) -> Sample:
        """The sample in row `row` of an index. One range of a shard is read, or two if the HR is another dataset's.

        Raises UsageError if the dataset holds latents.
        """
        self.require_pixels()
        if table["shard"][row].as_py() == table["hr_shard"][row].as_py():
            key, (hr, lr, info) = self._members(table, row, ("hr", "lr", "json"))
        else:
            _, (hr,) = self._members(table, row, ("hr",), of_hr=True)
            key, (lr, info) = self._members(table, row, ("lr", "json"))
        hr_pixels, lr_pixels = (decode_member(data, key, self.uri) for data in (hr, lr))
        return Sample(key, hr_pixels, lr_pixels, json.loads(info))

    def read_lr(self, table: pa.Table, row: int) -> tuple[str, np.ndarray]:
        """Key and LR of a sample; nothing else is read."""
        self.require_pixels()
        key, (lr,) = self._members(table, row, ("lr",))
        return key, decode_member(lr, key, self.uri)

    def read_latents(self, table: pa.Table, row: int) -> LatentSample:
        """The sample in row `row` of the index of a dataset of latents."""
        source = self.manifest.latents
        assert source
        members = ("latents",) if source.learner else ("latents", "lr")
        key, (packed, *lr) = self._members(table, row, members)
        try:
            latents = unpack(packed)
        except ValueError:
            raise damaged(key, self.uri) from None
        return LatentSample(key, latents, decode_member(lr[0], key, self.uri) if lr else None)

    def _members(
        self, table: pa.Table, row: int, members: tuple[str, ...], of_hr: bool = False
    ) -> tuple[str, list[bytes]]:
        """Key and members of a sample; `of_hr`: from the dataset that holds the HR."""
        shards = self._hr_shards if of_hr else self._shards
        shard, key = table["hr_shard" if of_hr else "shard"][row].as_py(), table["key"][row].as_py()
        spans = [(table[f"{name}_offset"][row].as_py(), table[f"{name}_size"][row].as_py()) for name in members]
        (start, _), (last, size) = spans[0], spans[-1]  # a sample's members lie one after the other
        try:
            data = read_member(shards, shard, start, last + size - start)
        except MissingShard:
            source = self.manifest.hr_from
            if of_hr and source and self.hr_dataset().digest != source.digest:
                raise DeeDSRError(self.hr_is_gone(f"{shard} with the HR of sample {key} is gone")) from None
            raise
        return key, [data[offset - start : offset - start + size] for offset, size in spans]


def no_validation(uri: str, recipe: Recipe) -> str:
    """Why a dataset of `recipe` at `uri` has no validation split, and how to get one: one sentence."""
    split = recipe.split
    if split.validation_patterns:
        patterns = ", ".join(map(repr, split.validation_patterns))
        why = f"split.validation_patterns ({patterns}) of recipe {recipe.name} match no source that was used"
    else:
        why = f"split.validation_share {split.validation_share:g} of recipe {recipe.name} took none of the sources"
    file = f"a recipe file with `base: {recipe.name}`" if recipe.name in builtin_recipes() else "its recipe file"
    return (
        f"{uri} has no validation split: {why}; for one, generate it with {file} and "
        f"`split: {{validation_share: 0.2}}`, or validation_patterns that match some of the sources"
    )
