"""Shards made of another dataset's: new degradations of its HR images, or pairs that hold what two datasets share."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO

import pyarrow.parquet

from deedsr.dataset.members import decode_stored
from deedsr.dataset.recipe import Recipe
from deedsr.errors import DeeDSRError
from pipelines.shards.build import shard_draft
from pipelines.shards.pieces import in_order
from pipelines.shards.plan import ShardPlan
from pipelines.shards.record import ShardRecord
from pipelines.shards.samples import Crop, Draft, degraded
from pipelines.storage import Storage

__all__ = ["FromHR", "Joined"]

_PIECES_PER_CPU = 8  # of a shard
# What a row says that the place in the new shard decides.
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
        rows: dict[str, dict[str, Any]] = {}
        for row in rows_of(plan.origin, self.hr, self.index):
            rows.setdefault(row["content"], row)  # its variants hold the same HR
        wanted = [(row, variant) for row in rows.values() for variant in range(self.recipe.variants_of(row["source"]))]
        with shard_draft(plan) as draft, Tars(self.hr) as tars:
            here = lambda some: list(self._samples(some, tars))
            for samples in in_order(self._make, _pieces(wanted, cpus), cpus, here=here):
                for sample, uri in samples:
                    draft.add(sample, uri)
            return draft.commit(out)

    def _make(self, wanted: list["Wanted"]) -> list[tuple[Draft, str]]:
        with Tars(self.hr) as tars:
            return list(self._samples(wanted, tars))

    def _samples(self, wanted: list["Wanted"], tars: "Tars") -> Iterator[tuple[Draft, str]]:
        """Each with where its source lies."""
        for _, group in groupby(wanted, key=lambda sample: sample[0]["content"]):
            variants = list(group)
            row = variants[0][0]
            place = [row[name] for name in ("top", "left", "height", "width")]
            crop = Crop(
                row["content"], row["root"], row["source"], row["source_sha256"], place, row["flip"], row["rotate"]
            )
            hr = _decoded(tars.read(row["hr_shard"], row["hr_offset"], row["hr_size"]), row, self.hr)
            where = {name: row[name] for name in ("hr_shard", "hr_ext", "hr_offset", "hr_size")}
            for sample in degraded(crop, hr, self.recipe, (variant for _, variant in variants)):
                yield Draft(sample.members, sample.row | where), row["source_uri"]


Wanted = tuple[dict[str, Any], int]  # a row with the HR, and one of its variants


def _pieces(wanted: list[Wanted], cpus: int) -> Iterator[list[Wanted]]:
    size = -(-len(wanted) // (cpus * _PIECES_PER_CPU))
    return (wanted[start : start + size] for start in range(0, len(wanted), size))


@dataclass(frozen=True)
class Joined:
    """Self-contained pairs of a dataset at `lr` that takes its HR from the one at `hr`."""

    lr: Storage
    index: str  # path of the `samples.parquet` of `lr`
    hr: Storage

    def build(self, plan: ShardPlan, out: Storage, cpus: int = 1) -> ShardRecord:
        with shard_draft(plan) as draft, Tars(self.hr) as hrs, Tars(self.lr) as lrs:
            for row in rows_of(plan.origin, self.lr, self.index):
                members = {"hr": hrs.read(row["hr_shard"], row["hr_offset"], row["hr_size"])}
                for name in ("lr", "json"):
                    members[name] = lrs.read(row["shard"], row[f"{name}_offset"], row[f"{name}_size"])
                draft.add(Draft(members, {k: v for k, v in row.items() if k not in PLACES}), row["source_uri"])
            return draft.commit(out)


def rows_of(shard: str, storage: Storage, index: str) -> Iterator[dict[str, Any]]:
    """A shard's rows of `samples.parquet`, of which only the row groups that can hold them are read."""
    with storage.open(index) as file:
        yield from pyarrow.parquet.read_table(file, filters=[("shard", "==", shard)]).to_pylist()


class Tars:
    """Reads members of tars, which stay open: those of a shard lie in few tars, one after the other."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._name = ""
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Tars":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file:
            self._file.close()

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Raises DeeDSRError if the tar is gone or ends before."""
        if name != self._name or self._file is None:
            if self._file:
                self._file.close()
            try:
                self._name, self._file = name, self._storage.open(name)
            except FileNotFoundError:
                raise DeeDSRError(
                    f"{self._storage.uri}/{name} is missing: run `deedsr verify {self._storage.uri}`"
                ) from None
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise DeeDSRError(f"{self._storage.uri}/{name} is cut off: run `deedsr verify {self._storage.uri}`")
        return data


def _decoded(data: bytes, row: dict[str, Any], storage: Storage) -> Any:
    try:
        return decode_stored(data)
    except ValueError:
        raise DeeDSRError(f"{storage.uri}: sample {row['key']} is damaged: run `deedsr verify {storage.uri}`") from None
