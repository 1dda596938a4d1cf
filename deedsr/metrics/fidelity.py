"""PSNR and SSIM on the Y channel of BT.601, and that channel."""

import math

import cv2
import numpy as np

from deedsr.metrics.metric import Metric, Setting

__all__ = ["METRICS", "WINDOW", "grey", "luma", "psnr_y", "ssim_y"]

LEAST_ERROR = 1e-8  # of the squared peak, as in published logs
WINDOW, SIGMA = 11, 1.5  # the Gaussian window of Wang et al. 2004
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# MATLAB's rgb2ycbcr on 8-bit RGB: Y runs from 16 to 235.
_WEIGHTS = np.array([65.481, 128.553, 24.966]) / 255


def luma(image: np.ndarray, border: int = 0) -> np.ndarray:
    """Y of an 8-bit RGB image (H, W, 3) as float64 (H, W) in 16..235, without `border` pixels on each side.

    Raises ValueError for anything but uint8 RGB and for an image that the border eats up.
    """
    _require_rgb(image)
    height, width = image.shape[:2]
    if border < 0 or min(height, width) <= 2 * border:
        raise ValueError(f"an image of {height}x{width} pixels has nothing inside a border of {border}")
    inside = image[border : height - border, border : width - border]
    return inside.astype(np.float64) @ _WEIGHTS + 16


def grey(image: np.ndarray) -> np.ndarray:
    """.299 R + .587 G + .114 B of an 8-bit RGB image (H, W, 3) as float64 (H, W) in 0..255, for NIQE.

    One colour in a thousand lies half-way between two integers. Published logs were computed in float32: so are these
    values, but for the sum, which is rounded once.
    """
    _require_rgb(image)
    shares = (image.astype(np.float32) / 255).astype(np.float64)
    weights = np.array([0.299, 0.587, 0.114], np.float32).astype(np.float64)
    return ((shares @ weights).astype(np.float32) * np.float32(255)).astype(np.float64)


def _require_rgb(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"metrics take uint8 RGB images (H, W, 3), got {image.dtype} of shape {image.shape}")


def _lumas(image: np.ndarray, reference: np.ndarray, border: int) -> tuple[np.ndarray, np.ndarray]:
    if image.shape != reference.shape:
        raise ValueError(f"image and reference differ in size: {image.shape} and {reference.shape}")
    return luma(image, border), luma(reference, border)


def psnr_y(image: np.ndarray, reference: np.ndarray, border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 RGB images (H, W, 3) on BT.601 Y.

    Y is not rounded; peak value 255. `LEAST_ERROR` is added to the mean square, so that equal images have 80 dB.
    `border`: pixels left out on each side; published figures of real-world super-resolution leave none out.
    """
    x, y = _lumas(image, reference, border)
    mean_square = float(np.mean((x - y) ** 2)) / 255**2
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


def ssim_y(image: np.ndarray, reference: np.ndarray, border: int = 0) -> float:
    """Structural similarity (0..1) of two uint8 RGB images (H, W, 3) on BT.601 Y, rounded to integers.

    Wang et al. 2004: Gaussian window of 11 pixels with sigma 1.5, population covariance, data range 255, averaged where
    the window lies inside; a negative contrast-structure term counts as 0. Libraries differ in these choices by up to
    0.15 on one pair: compare only figures of the same definition. `border`: pixels left out on each side.
    """
    x, y = map(np.round, _lumas(image, reference, border))
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


METRICS = (PSNR, SSIM)
