"""What is measured of one enlarged picture beside its HR and its LR, and intervals over pictures."""

import math
from collections.abc import Callable

import cv2
import numpy as np

from benchmarks.perceptual import PerceptualDistance
from deedsr.dataset.keys import generator
from deedsr.metrics import niqe, psnr_y, ssim_y

PATCH = 16  # pixels a side of the patches in which noise is looked for
FLAT = 3.0  # 8-bit levels: an HR patch that deviates less from a plane is flat
RESAMPLES = 10_000
MOST = 100.0  # dB of equal pictures, which JSON can hold


def measure(picture: np.ndarray, hr: np.ndarray, perceptual: PerceptualDistance) -> dict[str, float]:
    """Of a uint8 RGB picture against its HR; `noise` is a sum over the HR's flat patches, so that it may be pooled."""
    deviations, flat = patch_deviations(picture), patch_deviations(hr) <= FLAT
    return {
        "psnr_y": psnr_y(picture, hr),
        "psnr_rgb": psnr(picture, hr),
        "ssim_y": ssim_y(picture, hr),
        "niqe": niqe(picture),
        "perceptual": perceptual(picture, hr),
        "noise": float(deviations[flat].sum()),
    }


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """dB over all pixels and channels."""
    error = float(np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return min(10 * math.log10(255**2 / error), MOST) if error else MOST


def consistency(picture: np.ndarray, lr: np.ndarray) -> float:
    """PSNR in dB between the LR and the picture reduced to its size by averaging areas."""
    return psnr(cv2.resize(picture.astype(np.float32), lr.shape[1::-1], interpolation=cv2.INTER_AREA), lr)


def patch_deviations(picture: np.ndarray) -> np.ndarray:
    """Standard deviation of grey, in 8-bit levels, around the plane fitted to each patch: shading is no noise. (N,)"""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64)
    rows, columns = (side // PATCH for side in grey.shape)
    grey = grey[: rows * PATCH, : columns * PATCH]
    patches_NP = grey.reshape(rows, PATCH, columns, PATCH).swapaxes(1, 2).reshape(-1, PATCH * PATCH)
    down, across = (axis.ravel() - (PATCH - 1) / 2 for axis in np.mgrid[:PATCH, :PATCH])
    plane = np.stack([np.ones(PATCH * PATCH), down, across])
    plane /= np.linalg.norm(plane, axis=1, keepdims=True)
    rest_NP = patches_NP - patches_NP @ plane.T @ plane
    return np.sqrt(np.mean(rest_NP**2, axis=1))


def interval(statistic: Callable[[np.ndarray], np.ndarray], pictures: int) -> tuple[float, float, float]:
    """A figure over pictures with its 95 % bootstrap interval.

    `statistic` takes indices of pictures (R, pictures) and gives the figure of each row (R,).
    """
    drawn = generator("bootstrap over pictures").integers(pictures, size=(RESAMPLES, pictures))
    low, high = np.percentile(statistic(drawn), [2.5, 97.5])
    return float(statistic(np.arange(pictures)[None])[0]), float(low), float(high)
