"""DISTS (Ding et al. 2020): similarity of the means and of the structure of VGG16's feature maps.

Shapes: B batch (picture, reference), C channels, H W pixels.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from deedsr.metrics.learned import LearnedMetric, shipped_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deedsr.metrics.weights import WeightsFile

__all__ = ["DISTS", "METRICS"]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pictures in 0..1
C1 = C2 = 1e-6
MIN_SIDE = 16  # pixels that VGG16's poolings need


class DISTS(LearnedMetric):
    name, title, digits = "dists", "DISTS", 4
    definition = "border 0, VGG16 with Hann-window L2 pooling, RGB in 0..1, full size, mean over pictures"
    source = "Ding et al. 2020, DISTS_pytorch 0.1"
    higher_is_better = False

    def network(self) -> "tuple[nn.Module, WeightsFile]":
        from deedsr.metrics.networks.vgg import FILE, VGG16, HannPooling

        return VGG16(HannPooling), FILE

    @cached_property
    def weights(self) -> "tuple[Tensor, Tensor]":
        """Of the means and of the structure, for each channel of the picture and of the five maps: (C,), sum 1."""
        stored = shipped_tensors("dists_vgg16.safetensors")
        alpha, beta = (stored[name].flatten().to(self.setting.device) for name in ("alpha", "beta"))
        total = alpha.sum() + beta.sum()
        return alpha / total, beta / total

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> float:
        import torch

        assert reference is not None
        if min(picture.shape[:2]) < MIN_SIDE:
            raise ValueError(f"DISTS needs {MIN_SIDE} pixels a side, got {picture.shape[0]}x{picture.shape[1]}")
        x_BCHW = self.tensor(picture, reference)
        mean, deviation = (x_BCHW.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
        means, structures = [], []
        for features_BCHW in (x_BCHW, *self.compute((x_BCHW - mean) / deviation)):
            x_CP, y_CP = features_BCHW.flatten(2)  # P places
            x_mean, y_mean = x_CP.mean(1), y_CP.mean(1)
            variances = x_CP.var(1, correction=0) + y_CP.var(1, correction=0)
            covariance = (x_CP * y_CP).mean(1) - x_mean * y_mean
            means.append((2 * x_mean * y_mean + C1) / (x_mean.square() + y_mean.square() + C1))
            structures.append((2 * covariance + C2) / (variances + C2))
        alpha, beta = self.weights
        return 1 - float((alpha * torch.cat(means)).sum() + (beta * torch.cat(structures)).sum())


METRICS = (DISTS,)
