"""PSNR on the Y channel."""

import math

import numpy as np

from deedsr.metrics.luma import luma
from deedsr.metrics.metric import Metric, Setting

__all__ = ["METRICS", "psnr_y"]


def psnr_y(image: np.ndarray, reference: np.ndarray, border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 RGB images (H, W, 3) on BT.601 Y; infinite for equal images.

    Y is not rounded; peak value 255. `border`: pixels left out on each side; published figures of real-world
    super-resolution leave none out.
    """
    if image.shape != reference.shape:
        raise ValueError(f"image and reference differ in size: {image.shape} and {reference.shape}")
    mean_square = float(np.mean((luma(image, border) - luma(reference, border)) ** 2))
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


class PSNR(Metric):
    name, title, unit = "psnr", "PSNR-Y", "dB"
    source = "as IQA-PyTorch's psnr on Y"
    higher_is_better = True

    def __init__(self, setting: Setting = Setting()):
        super().__init__(setting)
        self.definition = f"border {setting.border}, Y of BT.601 (16 to 235) not rounded, peak 255, mean over pictures"

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> float:
        assert reference is not None
        return psnr_y(picture, reference, self.setting.border)


METRICS = (PSNR,)
