"""SSIM on the Y channel."""

import cv2
import numpy as np

from deedsr.metrics.luma import luma
from deedsr.metrics.metric import Metric, Setting

__all__ = ["METRICS", "ssim_y"]

WINDOW, SIGMA = 11, 1.5  # the Gaussian window of Wang et al. 2004
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim_y(image: np.ndarray, reference: np.ndarray, border: int = 0) -> float:
    """Structural similarity (0..1) of two uint8 RGB images (H, W, 3) on BT.601 Y, rounded to integers.

    Wang et al. 2004: Gaussian window of 11 pixels with sigma 1.5, population covariance, data range 255, averaged where
    the window lies inside; a negative contrast-structure term counts as 0. Libraries differ in these choices by up to
    0.15 on one pair: compare only figures of the same definition. `border`: pixels left out on each side.
    """
    if image.shape != reference.shape:
        raise ValueError(f"image and reference differ in size: {image.shape} and {reference.shape}")
    x, y = (np.round(luma(picture, border)) for picture in (image, reference))
    if min(x.shape) < WINDOW:
        raise ValueError(
            f"SSIM needs {WINDOW} pixels a side inside the border of {border}, got an image of "
            f"{image.shape[0]}x{image.shape[1]}"
        )
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    variances = _local_mean(x * x) + _local_mean(y * y) - mean_x**2 - mean_y**2
    covariance = _local_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    contrast_structure = np.maximum((2 * covariance + C2) / (variances + C2), 0)
    return float(np.mean(luminance * contrast_structure))


def _local_mean(y: np.ndarray) -> np.ndarray:
    """Mean in the Gaussian window, where it lies inside."""
    taps, rim = cv2.getGaussianKernel(WINDOW, SIGMA), WINDOW // 2
    return cv2.sepFilter2D(y, -1, taps, taps)[rim:-rim, rim:-rim]


class SSIM(Metric):
    name, title, digits = "ssim", "SSIM-Y", 4
    source = "Wang et al. 2004, as IQA-PyTorch's ssim on Y"
    higher_is_better = True

    def __init__(self, setting: Setting = Setting()):
        super().__init__(setting)
        self.definition = (
            f"border {setting.border}, Y of BT.601 rounded to integers, 11x11 Gaussian window of sigma 1.5, population "
            "covariance, windows inside, negative contrast-structure term as 0, mean over pictures"
        )

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> float:
        assert reference is not None
        return ssim_y(picture, reference, self.setting.border)


METRICS = (SSIM,)
