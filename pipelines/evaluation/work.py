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
from deedsr.metrics import niqe_features, psnr_y, ssim_y
from pipelines.dataset import Dataset
from pipelines.models import load_pipeline
from pipelines.placement import Device

if TYPE_CHECKING:
    from deedsr.sampling.settings import SamplingSettings

__all__ = ["METHODS", "METRICS", "Evaluated", "Evaluator"]

METRICS = ("psnr", "ssim", "niqe")  # PSNR and SSIM on Y
METHODS = ("model", "bicubic")


class Evaluated(NamedTuple):
    """What came of one pair."""

    key: str
    source: str | None
    pictures: dict[str, np.ndarray]  # lr, METHODS, hr; uint8 RGB (height, width, 3)
    metrics: dict[str, dict[str, float | None]]  # by method: the metrics that single pictures have
    features: dict[str, np.ndarray]  # by method: of NIQE, (blocks, 36), where it is asked for


@dataclass(frozen=True)
class Evaluator:
    """Samples and measures pairs of `dataset`. Pickles; each process loads the model when the first pair needs it.

    `device`, `digest` and `base`: see `pipelines.models.load_pipeline`.
    """

    model: str
    dataset: Dataset
    metrics: tuple[str, ...]
    sampling: "SamplingSettings"
    seed: int
    device: Device
    digest: str | None = None
    base: str | None = None

    def __call__(self, pair: pa.Table) -> Evaluated:
        """`pair`: one row of the dataset's index."""
        key, hr, lr, info = self.dataset.read(pair, 0)
        enlarged = {
            "model": self._sample(key, lr),
            "bicubic": cv2.resize(lr, hr.shape[1::-1], interpolation=cv2.INTER_CUBIC),
        }
        return Evaluated(
            key,
            info.get("source"),
            {"lr": lr, **enlarged, "hr": hr},
            {method: self._measure(picture, hr) for method, picture in enlarged.items()},
            {method: niqe_features(picture) for method, picture in enlarged.items()} if "niqe" in self.metrics else {},
        )

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

    def _measure(self, picture: np.ndarray, hr: np.ndarray) -> dict[str, float | None]:
        measures = {"psnr": psnr_y, "ssim": ssim_y}
        scale = self.dataset.scale
        return {name: _finite(measures[name](picture, hr, scale)) for name in self.metrics if name in measures}


def _finite(value: float) -> float | None:
    """JSON knows no infinity, which is the PSNR of equal pictures."""
    return value if math.isfinite(value) else None
