"""PSNR on the Y channel."""

import math

import numpy as np

from deedsr.metrics.luma import luma
from deedsr.metrics.metric import Metric, Setting

__all__ = ["METRICS", "psnr_y"]

LEAST_ERROR = 1e-8  # of the squared peak, as in published logs


def psnr_y(image: np.ndarray, reference: np.ndarray, border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 RGB images (H, W, 3) on BT.601 Y.

    Y is not rounded; peak value 255. `LEAST_ERROR` is added to the mean square, so that equal images have 80 dB.
    `border`: pixels left out on each side; published figures of real-world super-resolution leave none out.
    """
    if image.shape != reference.shape:
        raise ValueError(f"image and reference differ in size: {image.shape} and {reference.shape}")
    mean_square = float(np.mean((luma(image, border) - luma(reference, border)) ** 2)) / 255**2
    return -10 * math.log10(mean_square + LEAST_ERROR)


class PSNR(Metric):
    name, title, unit = "psnr", "PSNR-Y", "dB"
    source = "as IQA-PyTorch's psnr on Y"
    higher_is_better = True

    def __init__(self, setting: Setting = Setting()):
        super().__init__(setting)
        self.definition = (
            f"border {setting.border}, Y of BT.601 (16 to 235) not rounded, at most 80 dB, mean over pictures"
        )

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> float:
        assert reference is not None
        return psnr_y(picture, reference, self.setting.border)


METRICS = (PSNR,)
