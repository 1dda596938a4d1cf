"""The work on one pair: the model's picture, bicubic interpolation, and their metrics."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from deedsr import __version__
from deedsr.dataset.keys import generator
from deedsr.metrics.metric import Metric, Setting
from deedsr.metrics.registry import selected
from pipelines.data.dataset import Dataset
from pipelines.models import load_pipeline, usable_device
from pipelines.placement import Device
from pipelines.storage import localize

if TYPE_CHECKING:
    from deedsr.sampling.settings import SamplingSettings

__all__ = ["METHODS", "Evaluated", "Evaluator"]

METHODS = ("model", "bicubic")


class Evaluated(NamedTuple):
    """What came of one pair."""

    key: str
    source: str | None
    pictures: dict[str, np.ndarray]  # lr, METHODS, hr; uint8 RGB (height, width, 3)
    metrics: dict[str, dict[str, float | None]]  # by method: the metrics that single pictures have
    features: dict[str, dict[str, np.ndarray]]  # by method: what metrics of a set take of this picture


@dataclass(frozen=True)
class Evaluator:
    """Samples and measures pairs of `dataset`. Pickles; each process loads the model when the first pair needs it.

    `device`, `digest` and `base`: see `pipelines.models.load_pipeline`. `border`, `metric_weights`: see
    `deedsr.metrics.metric.Setting`; the weights may lie in object storage.
    """

    model: str
    dataset: Dataset
    metrics: tuple[str, ...]
    sampling: "SamplingSettings"
    seed: int
    device: Device
    digest: str | None = None
    base: str | None = None
    border: int = 0
    metric_weights: str | None = None

    def __call__(self, pair: pa.Table) -> Evaluated:
        """`pair`: one row of the dataset's index."""
        key, hr, lr, info = self.dataset.read(pair, 0)
        enlarged = {
            "model": self._sample(key, lr),
            "bicubic": cv2.resize(lr, hr.shape[1::-1], interpolation=cv2.INTER_CUBIC),
        }
        measured = {
            method: {name: metric.measure(picture, hr) for name, metric in self.measures.items()}
            for method, picture in enlarged.items()
        }
        figures: dict[str, dict[str, float | None]] = {method: {} for method in measured}
        features: dict[str, dict[str, np.ndarray]] = {method: {} for method in measured}
        for method, values in measured.items():
            for name, value in values.items():
                if self.measures[name].of_pictures:
                    figures[method][name] = _finite(value)
                else:
                    features[method][name] = value
        return Evaluated(key, info.get("source"), {"lr": lr, **enlarged, "hr": hr}, figures, features)

    @cached_property
    def measures(self) -> dict[str, Metric]:
        """The metrics by name. Raises UsageError where there is no such metric."""
        weights = localize(self.metric_weights) if self.metric_weights else None
        return selected(self.metrics, Setting(self.border, weights, str(usable_device(self.device))))

    def made_of(self, digest: str) -> dict[str, Any]:
        """What the figures of a pair follow from. `digest`: of the model, see `pipelines.models.model_digest`."""
        return {
            "version": __version__,
            "model": digest,
            "dataset": self.dataset.digest,
            "metrics": self.metrics,
            "sampling": self.sampling.as_dict(),
            "seed": self.seed,
            "device": self.device,
        }

    @cached_property
    def pipeline(self) -> Any:
        return load_pipeline(self.model, self.device, self.digest, self.base)

    def _sample(self, key: str, lr: np.ndarray) -> np.ndarray:
        """The model's picture. Its noise follows from the seed and the key, whatever else is evaluated."""
        import torch

        number = int(generator("evaluation", self.seed, key).integers(2**62))
        noise = torch.Generator().manual_seed(number)
        return np.asarray(self.pipeline(lr, generator=noise, **self.sampling.as_dict()).images[0])


def _finite(value: float | None) -> float | None:
    """JSON knows neither infinity nor NaN, which a metric of another package may give."""
    return value if value is not None and math.isfinite(value) else None
