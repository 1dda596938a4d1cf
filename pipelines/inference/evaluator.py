"""The work on one pair of an evaluation, and what is measured so far, kept so that the same command continues there.

OUT/_state/evaluation.json                what is evaluated, and the MLflow run of it
OUT/_state/evaluation/DIGEST/KEY.json     figures of one sample, written after its pictures; DIGEST: of what they
                                          follow from
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

import cv2
import numpy as np
import pyarrow as pa

from deedsr import __version__
from deedsr.dataset.keys import generator
from deedsr.dataset.manifest import STATE
from deedsr.metrics.metric import Metric, Setting
from deedsr.metrics.registry import selected
from pipelines.data.dataset import Dataset, SourceInfo
from pipelines.models import Model, usable_device
from pipelines.placement import Device
from pipelines.storage import Storage, localize
from pipelines.storage.waiting import patiently

if TYPE_CHECKING:
    from deedsr.hub.settings import SamplingSettings
    from deedsr.sampling.pipeline import DeeDSRPipeline

Old = TypeVar("Old")
New = TypeVar("New")

METHODS = ("model", "bicubic")
RESULTS = "results.json"
PICTURES = "pictures"
_RUN = f"{STATE}/evaluation.json"
_SAMPLES = f"{STATE}/evaluation"
_THREADS = 16  # records read at a time


class Record(TypedDict):
    """A sample's part of `results.json`."""

    key: str
    source: SourceInfo | None
    metrics: dict[str, dict[str, float | None]]  # by method: the metrics that single pictures have
    pictures: dict[str, str]  # paths in the output: lr, METHODS, hr


class Measured(NamedTuple):
    """One sample. `features`: by method, what metrics of a set take of this picture."""

    record: Record
    features: dict[str, dict[str, np.ndarray]]


class Evaluated(NamedTuple):
    """Result of one pair. `pictures`: lr, METHODS, hr; uint8 RGB (height, width, 3)."""

    sample: Measured
    pictures: dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluator:
    """Samples and measures pairs of `dataset`. Pickles; each process loads the model when the first pair needs it.

    `device`: see `pipelines.models.usable_device`. `border`, `metric_weights`: see `deedsr.metrics.metric.Setting`; the
    weights may lie in object storage.
    """

    model: Model
    dataset: Dataset
    metrics: tuple[str, ...]
    sampling: "SamplingSettings"
    seed: int
    device: Device
    border: int = 0
    metric_weights: str | None = None

    def __call__(self, pair: pa.Table) -> Evaluated:
        """`pair`: one row of the dataset's index."""
        key, hr, lr, info = self.dataset.read(pair, 0)
        enlarged = {
            "model": self._sample(key, lr),
            "bicubic": cv2.resize(lr, hr.shape[1::-1], interpolation=cv2.INTER_CUBIC),
        }
        figures: dict[str, dict[str, float | None]] = {method: {} for method in enlarged}
        features: dict[str, dict[str, np.ndarray]] = {method: {} for method in enlarged}
        for method, picture in enlarged.items():
            for name, metric in self.measures.items():
                value = metric.measure(picture, hr)
                if metric.of_pictures:
                    figures[method][name] = _finite(value)
                else:
                    features[method][name] = value
        pictures = {"lr": lr, **enlarged, "hr": hr}
        files = {name: f"{PICTURES}/{key}.{name}.png" for name in pictures}
        record = Record(key=key, source=info.get("source"), metrics=figures, pictures=files)
        return Evaluated(Measured(record, features), pictures)

    @cached_property
    def measures(self) -> dict[str, Metric]:
        """The metrics by name. Raises UsageError where there is no such metric."""
        weights = localize(self.metric_weights) if self.metric_weights else None
        return selected(self.metrics, Setting(self.border, weights, str(usable_device(self.device))))

    def made_of(self) -> dict[str, Any]:
        """What the metrics of a pair depend on."""
        return {
            "version": __version__,
            "model": self.model.digest,
            "dataset": self.dataset.digest,
            "metrics": self.metrics,
            "sampling": self.sampling.as_dict(),
            "seed": self.seed,
            "device": self.device,
        }

    @cached_property
    def pipeline(self) -> "DeeDSRPipeline":
        return self.model.load(self.device)

    def _sample(self, key: str, lr: np.ndarray) -> np.ndarray:
        """The model's picture. Its noise follows from the seed and the key, whatever else is evaluated."""
        import torch

        number = int(generator("evaluation", self.seed, key).integers(2**62))
        noise = torch.Generator().manual_seed(number)
        return np.asarray(self.pipeline(lr, generator=noise, **self.sampling.as_dict()).images[0])


def _finite(value: float | None) -> float | None:
    """None for infinity and NaN, which JSON lacks and a metric of another package may return."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class State:
    """`samples`: digest of what the figures of a sample follow from; `evaluation`: of the whole, see `run_id`."""

    out: Storage
    samples: str
    evaluation: str

    @property
    def _folder(self) -> str:
        return f"{_SAMPLES}/{self.samples[:16]}"

    def run_id(self) -> str | None:
        """MLflow run of this very evaluation, None where another one was begun here last."""
        begun = self._read(_RUN)
        return begun.get("run_id") if begun.get("evaluation") == self.evaluation else None

    def results(self, run_id: str) -> dict[str, Any] | None:
        """`results.json` of a run, None where there is none yet."""
        found = self._read(RESULTS)
        return found if found.get("run_id") == run_id else None

    def begin(self, run_id: str) -> None:
        """Makes the output this evaluation's: what an earlier one left and this one is about to replace goes first."""
        if self.run_id() == run_id:
            return
        self.out.delete(RESULTS)
        self.out.delete_many(
            [entry.path for entry in self.out.list(_SAMPLES) if not entry.path.startswith(f"{self._folder}/")]
        )
        self._write(_RUN, {"evaluation": self.evaluation, "run_id": run_id})

    def measured(self, keys: Iterable[str]) -> dict[str, Measured]:
        """Those of the samples that an earlier command measured, with their pictures still there."""
        there = {entry.path for entry in self.out.list(self._folder)}
        known = [key for key in keys if self._place(key) in there]
        if not known:
            return {}
        pictures = {entry.path for entry in self.out.list(PICTURES)}
        with ThreadPoolExecutor(_THREADS) as threads:
            found = dict(zip(known, threads.map(self._read, map(self._place, known)), strict=True))
        return {
            key: Measured(stored["record"], _each(_restored, stored["features"]))
            for key, stored in found.items()
            if stored and pictures.issuperset(stored["record"]["pictures"].values())
        }

    def add(self, sample: Measured) -> None:
        stored = {"record": sample.record, "features": _each(_plain, sample.features)}
        self._write(self._place(sample.record["key"]), stored)

    def _place(self, key: str) -> str:
        return f"{self._folder}/{key}.json"

    def _read(self, path: str) -> dict[str, Any]:
        """{} for what is missing or is no JSON object."""
        try:
            found = json.loads(self.out.read(path))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, path: str, value: Mapping[str, Any]) -> None:
        patiently(self.out.write, path, json.dumps(value).encode())


def _each(change: Callable[[Old], New], features: Mapping[str, Mapping[str, Old]]) -> dict[str, dict[str, New]]:
    return {method: {name: change(value) for name, value in found.items()} for method, found in features.items()}


class _Plain(TypedDict):
    """An array as JSON, which keeps every bit of a float, and no shape of nothing."""

    shape: tuple[int, ...]
    type: str
    values: list[Any]


def _plain(values: np.ndarray) -> _Plain:
    return _Plain(shape=values.shape, type=str(values.dtype), values=values.ravel().tolist())


def _restored(stored: _Plain) -> np.ndarray:
    return np.array(stored["values"], stored["type"]).reshape(stored["shape"])
