"""LPIPS and DISTS, and the base of metrics that compute features with a frozen network.

Shapes: B batch (picture, reference), C channels, H W pixels.
"""

from abc import abstractmethod
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deedsr.metrics.metric import Metric

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deedsr.metrics.networks import PublishedNetwork

__all__ = ["DISTS", "LPIPS", "METRICS", "LearnedMetric"]


class LearnedMetric(Metric):
    """A metric with a frozen network, which is loaded once for each object."""

    higher_is_better = False

    @abstractmethod
    def network(self) -> "PublishedNetwork":
        """The network before its weights are loaded."""

    @cached_property
    def _loaded(self) -> "tuple[nn.Module, str]":
        from deedsr.metrics.networks import load_into, locate

        network = self.network()
        digest = load_into(network, locate(network.file, self.name, self.setting.weights))
        return network.to(self.setting.device), f"weights {Path(network.file.name).stem}, tensors' SHA-256 {digest}"

    def prepare(self) -> None:
        _ = self._loaded

    def statement(self) -> str:
        """With the weights that were loaded, if they were."""
        loaded = self.__dict__.get("_loaded")
        return super().statement() + (f"; {loaded[1]}" if loaded else "")

    def compute(self, pictures_BCHW: "Tensor") -> Any:
        """The network's output for pictures on the metric's device."""
        import torch

        with torch.inference_mode():
            return self._loaded[0](pictures_BCHW)


class FeatureDistance(LearnedMetric):
    """A distance of the feature maps of a picture and its reference."""

    digits = 4
    min_side: int  # pixels that the network's poolings need
    mean: tuple[float, float, float]  # of the network's training pictures
    deviation: tuple[float, float, float]

    def pair(self, picture: np.ndarray, reference: np.ndarray | None) -> "Tensor":
        """Picture and reference as a float32 tensor (2, 3, H, W) in 0..1. Raises ValueError for unsuitable sizes."""
        import torch

        assert reference is not None
        height, width = picture.shape[:2]
        if min(height, width) < self.min_side:
            raise ValueError(f"{self.title} needs {self.min_side} pixels a side, got {height}x{width}")
        sizes = {picture.shape, reference.shape}
        if len(sizes) != 1:
            raise ValueError(f"{self.name} compares pictures of one size, got {' and '.join(map(str, sorted(sizes)))}")
        pictures = torch.from_numpy(np.stack([picture, reference])).to(self.setting.device)
        return pictures.permute(0, 3, 1, 2).float() / 255

    def maps(self, x_BCHW: "Tensor") -> "list[Tensor]":
        """Feature maps of normalised pictures."""
        mean, deviation = (x_BCHW.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.deviation))
        return self.compute((x_BCHW - mean) / deviation)


class LPIPS(FeatureDistance):
    """LPIPS (Zhang et al. 2018): distance of AlexNet's features, weighted by fits to human judgements."""

    name, title = "lpips", "LPIPS"
    definition = "border 0, AlexNet, v0.1, RGB in -1..1, full size, mean over pictures"
    source = "Zhang et al. 2018, lpips 0.1.4"
    min_side = 35
    mean, deviation = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in -1..1
    epsilon = 1e-10

    def network(self) -> "PublishedNetwork":
        from deedsr.metrics.networks import AlexNet

        return AlexNet()

    @cached_property
    def heads(self) -> "list[Tensor]":
        """Weights of the channels of the five feature maps, (1, C, 1, 1)."""
        stored = _shipped_tensors("lpips_alexnet.safetensors")
        return [stored[f"lin{number}.model.1.weight"].to(self.setting.device) for number in range(len(stored))]

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> float:
        distance = 0.0
        for features_BCHW, head in zip(self.maps(self.pair(picture, reference) * 2 - 1), self.heads, strict=True):
            unit_BCHW = features_BCHW / (features_BCHW.square().sum(1, keepdim=True).sqrt() + self.epsilon)
            difference_CHW = (unit_BCHW[0] - unit_BCHW[1]).square()
            distance += float((head[0] * difference_CHW).sum(0).mean())
        return distance


class DISTS(FeatureDistance):
    """DISTS (Ding et al. 2020): similarity of the means and of the structure of VGG16's feature maps."""

    name, title = "dists", "DISTS"
    definition = "border 0, VGG16 with Hann-window L2 pooling, RGB in 0..1, full size, mean over pictures"
    source = "Ding et al. 2020, DISTS_pytorch 0.1"
    min_side = 16
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pictures in 0..1
    c1 = c2 = 1e-6

    def network(self) -> "PublishedNetwork":
        from deedsr.metrics.networks import VGG16, HannPooling

        return VGG16(HannPooling)

    @cached_property
    def weights(self) -> "tuple[Tensor, Tensor]":
        """Of the means and of the structure, for each channel of the picture and of the five maps: (C,), sum 1."""
        stored = _shipped_tensors("dists_vgg16.safetensors")
        alpha, beta = (stored[name].flatten().to(self.setting.device) for name in ("alpha", "beta"))
        total = alpha.sum() + beta.sum()
        return alpha / total, beta / total

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> float:
        import torch

        x_BCHW = self.pair(picture, reference)
        means, structures = [], []
        for features_BCHW in (x_BCHW, *self.maps(x_BCHW)):
            x_CP, y_CP = features_BCHW.flatten(2)  # P positions
            x_mean, y_mean = x_CP.mean(1), y_CP.mean(1)
            variances = x_CP.var(1, correction=0) + y_CP.var(1, correction=0)
            covariance = (x_CP * y_CP).mean(1) - x_mean * y_mean
            means.append((2 * x_mean * y_mean + self.c1) / (x_mean.square() + y_mean.square() + self.c1))
            structures.append((2 * covariance + self.c2) / (variances + self.c2))
        alpha, beta = self.weights
        return 1 - float((alpha * torch.cat(means)).sum() + (beta * torch.cat(structures)).sum())


def _shipped_tensors(name: str) -> "dict[str, Tensor]":
    """Tensors of a small file beside this module."""
    from deedsr.metrics.networks import read_tensors

    with as_file(files("deedsr.metrics") / name) as path:
        return read_tensors(path)


METRICS = (DISTS, LPIPS)
