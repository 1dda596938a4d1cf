"""The second-order degradation chain: blur, resize, noise, JPEG, and again (docs/method.md, degradation).

Images inside the chain are BGR, float32 of 8-bit levels 0 to 255 or uint8; compression is the real codec (YCbCr 4:2:0),
not a differentiable copy of it. OpenCV's threads are the caller's matter: data workers call `cv2.setNumThreads(1)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from scipy.sparse import csr_array

from deedsr.degradation import noise
from deedsr.degradation.kernels import blur_kernel

__all__ = ["degrade"]

_JPEG_LIMIT = 65_500  # pixels a side
_DIRECT_SIZE = 129  # kernels with more elements go through a Fourier transform in OpenCV
_DIRECT_TAPS = 180  # from about here on the transform is faster
_INTERPOLATION = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def degrade(hr: np.ndarray, draws: dict[str, Any]) -> np.ndarray:
    """Degrade an HR image (uint8 HWC RGB) as `draws` of `draw_degradation` say; returns the LR image (uint8 HWC RGB).

    A pure function: the same image and draws, also after a round trip through JSON, give the same bytes. Raises
    `ValueError` for another kind of image or for draws made for another size.
    """
    if hr.dtype != np.uint8 or hr.ndim != 3 or hr.shape[2] != 3:
        raise ValueError(f"an HR image must be uint8 of shape (height, width, 3), got {hr.dtype} of shape {hr.shape}")
    if list(hr.shape[:2]) != list(draws["size"]):
        raise ValueError(f"the draws are for an HR image of size {draws['size']}, got {list(hr.shape[:2])}")
    image = cv2.cvtColor(hr, cv2.COLOR_RGB2BGR)
    for step in draws["steps"]:
        name, parameters = step["step"], {key: value for key, value in step.items() if key != "step"}
        image = _STEPS[name](image, **parameters)
    return cv2.cvtColor(_to_uint8(image), cv2.COLOR_BGR2RGB)


def blur(image: np.ndarray, kernel: str, size: int, **parameters: float) -> np.ndarray:
    """Correlate with a kernel of `kernels.blur_kernel`; borders are reflected."""
    return convolve(_to_float(image), blur_kernel(kernel, size, **parameters))


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate a float32 image with a kernel that sums to 1 and is symmetric about its centre.

    Weights too small to be seen are left out; a product of a column and a row is applied as two filters.
    """
    centre = kernel.shape[0] // 2
    column, row = kernel[:, centre], kernel[centre] / kernel[centre, centre]
    if np.abs(np.outer(column, row) - kernel).sum() < 1e-5:
        column, row = _significant(column), _significant(row)
        return cv2.sepFilter2D(image, cv2.CV_32F, row, column, borderType=cv2.BORDER_REFLECT_101)
    kernel = _significant(kernel)
    if kernel.size <= _DIRECT_SIZE or np.count_nonzero(kernel) > _DIRECT_TAPS:
        return cv2.filter2D(image, cv2.CV_32F, kernel, borderType=cv2.BORDER_REFLECT_101)

    # OpenCV takes the Fourier transform of larger kernels, at any number of taps: hand it bands of rows instead.
    height, width = image.shape[:2]
    radius = kernel.shape[0] // 2
    padded = cv2.copyMakeBorder(image, radius, radius, radius, radius, cv2.BORDER_REFLECT_101)
    blurred = np.zeros_like(image)
    for top in range(0, len(kernel), _DIRECT_SIZE // len(kernel)):
        band = kernel[top : top + _DIRECT_SIZE // len(kernel)]
        rows = padded[top : top + height + len(band) - 1]
        blurred += cv2.filter2D(rows, cv2.CV_32F, band, anchor=(0, 0))[:height, :width]
    return blurred


def _significant(weights: np.ndarray) -> np.ndarray:
    """The weights without the smallest, which together move no pixel by 0.013 levels, and without empty margins."""
    magnitude = np.abs(weights)
    ascending = np.sort(magnitude, axis=None)
    least = ascending[np.searchsorted(np.cumsum(ascending), 5e-5)]
    kept = np.where(magnitude < least, 0, weights)
    margin = np.argwhere(kept).min()
    return kept[(slice(margin, len(kept) - margin),) * kept.ndim] / kept.sum()


def rescale(image: np.ndarray, mode: str, factor: float) -> np.ndarray:
    """Resize by a factor, sizes rounded down, as `F.interpolate(scale_factor=factor)` does without antialiasing."""
    if factor == 1:
        return image
    height, width = (int(side * factor) for side in image.shape[:2])
    if mode == "area":
        return _average(_to_float(image), height, width)
    # OpenCV rounds the size up or down but maps pixels by the factor itself, so that cutting the surplus is exact.
    resized = cv2.resize(_to_float(image), None, fx=factor, fy=factor, interpolation=_INTERPOLATION[mode])
    return resized[:height, :width]


def resize(image: np.ndarray, mode: str, size: list[int], factor: float = 1.0) -> np.ndarray:
    """Resize to `size` (height, width), as `F.interpolate(size=size)` does without antialiasing.

    `factor` tells what `size` was drawn from.
    """
    height, width = size
    if mode == "area":
        return _average(_to_float(image), height, width)
    return cv2.resize(_to_float(image), (width, height), interpolation=_INTERPOLATION[mode])


def _average(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mean of the pixels that each output pixel touches (torch's area mode, adaptive average pooling)."""
    columns = cv2.transpose(_average_rows(image, height))
    return cv2.transpose(_average_rows(columns, width))


def _average_rows(image: np.ndarray, count: int) -> np.ndarray:
    length, index = image.shape[0], np.arange(count)
    start = index * length // count
    touched = -(-(index + 1) * length // count) - start
    ends = np.concatenate([[0], np.cumsum(touched)])
    source = np.arange(ends[-1]) + np.repeat(start - ends[:-1], touched)
    weights = np.repeat((1 / touched).astype(np.float32), touched)
    matrix = csr_array((weights, source, ends), shape=(count, length))
    return (matrix @ image.reshape(length, -1)).reshape(count, *image.shape[1:])


def add_noise(image: np.ndarray, family: str, gray: bool, seed: int, **strength: float) -> np.ndarray:
    """Add Gaussian (`sigma`) or Poisson (`scale`) noise and clip to 0..255."""
    add: Callable[..., np.ndarray] = noise.add_gaussian if family == "gaussian" else noise.add_poisson
    noisy = add(_to_float(image), gray=gray, seed=seed, **strength)
    return np.clip(noisy, 0, 255, out=noisy)


def compress(image: np.ndarray, quality: int) -> np.ndarray:
    """Through the JPEG codec and back; returns uint8."""
    if max(image.shape[:2]) > _JPEG_LIMIT:
        raise ValueError(f"JPEG holds at most {_JPEG_LIMIT} px a side, got {image.shape[0]}x{image.shape[1]}")
    encoded = cv2.imencode(".jpg", _to_uint8(image), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))


def _to_float(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32, copy=False)


def _to_uint8(image: np.ndarray) -> np.ndarray:
    """Round and saturate."""
    return cv2.add(image, 0, dtype=cv2.CV_8U)


_STEPS: dict[str, Callable[..., np.ndarray]] = {
    "blur1": blur,
    "resize1": rescale,
    "noise1": add_noise,
    "jpeg1": compress,
    "blur2": blur,
    "resize2": resize,
    "noise2": add_noise,
    "resize3": resize,
    "sinc": blur,
    "jpeg2": compress,
}
