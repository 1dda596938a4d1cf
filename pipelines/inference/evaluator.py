"""The work on one picture of an evaluation, and what is measured so far, kept so that the same command continues there.

OUT/_state/evaluation.json                what is evaluated, and the MLflow run of it
OUT/_state/evaluation/DIGEST/KEY.json     figures of one picture, or why it has none, written after the files of
                                          its versions; DIGEST: of what they follow from
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import cv2
import numpy as np

from deedsr import __version__
from deedsr.dataset.keys import generator
from deedsr.dataset.manifest import STATE
from deedsr.dataset.pictures import RejectedImage, read_stored, upright
from deedsr.metrics.metric import Metric, Setting
from deedsr.metrics.registry import named_in_errors, selected
from pipelines.data.dataset import Dataset, SourceInfo
from pipelines.distribution import in_threads
from pipelines.inference.options import EvaluateOptions
from pipelines.inference.parts import MADE, Part
from pipelines.inference.sampler import Sampler
from pipelines.models import Model, usable_device
from pipelines.placement import Device
from pipelines.storage import Storage, localize, object_at, require_here
from pipelines.storage.waiting import patiently

if TYPE_CHECKING:
    from deedsr.hub.settings import SamplingSettings

RESULTS = "results.json"
PICTURES = "pictures"
_RUN = f"{STATE}/evaluation.json"
_SAMPLES = f"{STATE}/evaluation"
_THREADS = 16  # records read at a time


class Record(TypedDict):
    """A picture's part of `results.json`."""

    key: str
    source: SourceInfo | None  # in a dataset
    metrics: dict[str, dict[str, float | None]]  # by method: the metrics that single pictures have
    pictures: dict[str, str]  # `lr`, `hr` and the methods: paths in the output, or locations of what was given


class Measured(NamedTuple):
    """One picture. `features`: by method, what metrics of a set take of it; `rejected`: why it has no figures;
    `versions`: of its files."""

    record: Record
    features: dict[str, dict[str, np.ndarray]]
    rejected: str = ""
    versions: tuple[str, ...] = ()


Evaluated = tuple[Measured, dict[str, np.ndarray]]  # of one part, with the pictures for the output: uint8 RGB (H, W, 3)


@dataclass(frozen=True)
class Evaluator:
    """Measures pictures of `methods`. Pickles; each process loads the model when the first part needs it.

    `device`: where this process computes, see `pipelines.models.usable_device`. `model`, `sampling`: of the method
    `model`; `dataset`: whose rows the parts are.
    """

    options: EvaluateOptions
    device: Device
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    model: Model | None
    sampling: "SamplingSettings | None"
    dataset: Dataset | None

    def __call__(self, part: Part) -> Evaluated:
        try:
            return self._evaluated(part)
        except RejectedImage as reason:
            record = Record(key=part.key, source=None, metrics={}, pictures={})
            return Measured(record, {}, str(reason), part.versions), {}

    def _evaluated(self, part: Part) -> Evaluated:
        pictures, source = self._given(part)
        made = [name for name in pictures if name not in part.files]
        lr, hr = pictures.get("lr"), pictures.get("hr")
        if lr is not None:
            height, width = _size(hr, lr, self.model)
            if self.model is not None:
                pictures["model"] = self._sample(part.key, lr)
            pictures["bicubic"] = cv2.resize(lr, (width, height), interpolation=cv2.INTER_CUBIC)
            made += [name for name in MADE if name in pictures]
        figures: dict[str, dict[str, float | None]] = {method: {} for method in self.methods}
        features: dict[str, dict[str, np.ndarray]] = {method: {} for method in self.methods}
        for method in self.methods:
            if hr is not None and pictures[method].shape != hr.shape:
                raise RejectedImage(f"{method} is {_told(pictures[method])}, the reference {_told(hr)}")
            for name, metric in self.measures.items():
                try:
                    with named_in_errors(name):
                        value = metric.measure(pictures[method], hr)
                        if metric.of_pictures:
                            figures[method][name] = _finite(value)
                        else:
                            features[method][name] = np.asarray(value)
                except ValueError as error:
                    raise RejectedImage(f"{name} of {method}: {error}") from error
        places = {**part.files, **{name: f"{PICTURES}/{part.key}.{name}.png" for name in made}}
        record = Record(
            key=part.key, source=source, metrics=figures, pictures={name: places[name] for name in pictures}
        )
        return Measured(record, features, "", part.versions), {name: pictures[name] for name in made}

    def _given(self, part: Part) -> tuple[dict[str, np.ndarray], SourceInfo | None]:
        """The pictures of a part by name, and where they come from."""
        given = {name: read_pixels(uri) for name, uri in part.files.items()}
        if part.row is None:
            return given, None
        assert self.dataset is not None
        _, hr, lr, info = self.dataset.read(part.row, 0)
        return given | {"lr": lr, "hr": hr}, info.get("source")

    @cached_property
    def measures(self) -> dict[str, Metric]:
        """The metrics by name. Raises UsageError where there is no such metric."""
        weights = localize(self.options.metric_weights) if self.options.metric_weights else None
        return selected(self.metrics, Setting(self.options.border, weights, str(usable_device(self.device))))

    def made_of(self) -> dict[str, Any]:
        """What the metrics of a part depend on, but its files."""
        return {
            "version": __version__,
            "methods": self.methods,
            "model": self.model and self.model.digest,
            "dataset": self.dataset and self.dataset.digest,
            "metrics": self.metrics,
            "sampling": self.sampling and self.sampling.identity(),
            "seed": self.options.seed,
            "device": self.device,
            "precision": self.options.precision,
        }

    @cached_property
    def sampler(self) -> Sampler:
        assert self.model is not None
        assert self.sampling is not None
        return Sampler(self.model, self.sampling, self.device, self.options.precision)

    def _sample(self, key: str, lr: np.ndarray) -> np.ndarray:
        """The model's picture. Its noise follows from the seed and the key, whatever else is evaluated."""
        import torch

        from deedsr.sampling.images import to_tensors, to_uint8

        number = int(generator("evaluation", self.options.seed, key).integers(2**62))
        return to_uint8(self.sampler(to_tensors(lr)[0], torch.Generator().manual_seed(number), key))


def read_pixels(uri: str) -> np.ndarray:
    """A picture file's pixels as stored, upright, uint8 RGB (H, W, 3): no colour profile is applied, as in the field's
    tools. Raises RejectedImage for what metrics are not defined for, UsageError on a worker without the folder."""
    storage, name = object_at(uri)
    try:
        data = storage.read(name)
    except FileNotFoundError:
        require_here(storage.uri)
        raise RejectedImage(f"{name} is gone") from None
    try:
        stored = read_stored(data, others=True)
        if stored.colour.dtype != np.uint8:
            raise RejectedImage("16 bits a channel, and metrics are defined for 8: convert it first")
        if stored.alpha is not None and stored.alpha.min() < 255:
            raise RejectedImage("has transparency: flatten it first")
        if stored.colour.ndim == 3 and stored.colour.shape[2] != 3:
            raise RejectedImage("not RGB or grey: convert it first")
    except RejectedImage as reason:
        raise RejectedImage(f"{name}: {reason}") from None
    colour = stored.colour if stored.colour.ndim == 3 else np.repeat(stored.colour[..., None], 3, 2)
    return upright(np.ascontiguousarray(colour), stored.orientation)


def _size(hr: np.ndarray | None, lr: np.ndarray, model: Model | None) -> tuple[int, int]:
    """Height and width of the enlarged LR."""
    scale = model.description.scale if model else None
    if hr is None:
        assert scale is not None
        return lr.shape[0] * scale, lr.shape[1] * scale
    factor = scale or max(hr.shape[0] // lr.shape[0], 1)
    if hr.shape != (lr.shape[0] * factor, lr.shape[1] * factor, 3):
        times = f"{factor} times" if scale else "a whole multiple of"
        raise RejectedImage(f"the reference is {_told(hr)}, not {times} the LR of {_told(lr)}")
    return hr.shape[0], hr.shape[1]


def _told(picture: np.ndarray) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"


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

    def measured(self, parts: Iterable[Part]) -> dict[str, Measured]:
        """Those of the parts that an earlier command measured, of the same files, whose pictures are still there."""
        there = {entry.path for entry in self.out.list(self._folder)}
        known = [part for part in parts if self._place(part.key) in there]
        if not known:
            return {}
        pictures = {entry.path for entry in self.out.list(PICTURES)}
        found = in_threads(self._read, [self._place(part.key) for part in known], _THREADS)
        samples = {}
        for part, stored in zip(known, found, strict=True):
            if not stored or tuple(stored.get("versions", ())) != part.versions:
                continue
            record, features = stored["record"], stored["features"]
            if pictures.issuperset(place for place in record["pictures"].values() if place.startswith(f"{PICTURES}/")):
                features = {way: {name: _restored(one) for name, one in of.items()} for way, of in features.items()}
                samples[part.key] = Measured(record, features, stored.get("rejected", ""), part.versions)
        return samples

    def add(self, sample: Measured) -> None:
        features = {way: {name: _plain(one) for name, one in of.items()} for way, of in sample.features.items()}
        self._write(self._place(sample.record["key"]), sample._asdict() | {"features": features})

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


def place_in(out: Storage, place: str) -> str:
    """Location of a picture of a record."""
    return f"{out.uri}/{place}" if place.startswith(f"{PICTURES}/") else place


def _plain(values: np.ndarray) -> dict[str, Any]:
    """An array as JSON, which keeps every bit of a float, and no shape of nothing."""
    return {"shape": values.shape, "type": str(values.dtype), "values": values.ravel().tolist()}


def _restored(stored: Mapping[str, Any]) -> np.ndarray:
    return np.array(stored["values"], stored["type"]).reshape(stored["shape"])
