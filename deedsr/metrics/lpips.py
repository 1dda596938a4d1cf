"""LPIPS (Zhang et al. 2018): distance of AlexNet's features, weighted as people judged.

Shapes: B batch (picture, reference), C channels, H W pixels.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from deedsr.metrics.learned import LearnedMetric, shipped_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deedsr.metrics.weights import WeightsFile

__all__ = ["LPIPS", "METRICS"]

MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in -1..1
EPSILON = 1e-10
MIN_SIDE = 35  # pixels that AlexNet's poolings need


class LPIPS(LearnedMetric):
    name, title, digits = "lpips", "LPIPS", 4
    definition = "border 0, AlexNet, v0.1, RGB in -1..1, full size, mean over pictures"
    source = "Zhang et al. 2018, lpips 0.1.4"
    higher_is_better = False

    def network(self) -> "tuple[nn.Module, WeightsFile]":
        from deedsr.metrics.networks.alexnet import FILE, AlexNet

        return AlexNet(), FILE

    @cached_property
    def heads(self) -> "list[Tensor]":
        """Weights of the channels of the five feature maps, (1, C, 1, 1)."""
        stored = shipped_tensors("lpips_alexnet.safetensors")
        return [stored[f"lin{number}.model.1.weight"].to(self.setting.device) for number in range(len(stored))]

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> float:
        assert reference is not None
        if min(picture.shape[:2]) < MIN_SIDE:
            raise ValueError(f"LPIPS needs {MIN_SIDE} pixels a side, got {picture.shape[0]}x{picture.shape[1]}")
        x_BCHW = self.tensor(picture, reference) * 2 - 1
        mean, deviation = (x_BCHW.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
        distance = 0.0
        for features_BCHW, head in zip(self.compute((x_BCHW - mean) / deviation), self.heads, strict=True):
            unit_BCHW = features_BCHW / (features_BCHW.square().sum(1, keepdim=True).sqrt() + EPSILON)
            difference_CHW = (unit_BCHW[0] - unit_BCHW[1]).square()
            distance += float((head[0] * difference_CHW).sum(0).mean())
        return distance


METRICS = (LPIPS,)
