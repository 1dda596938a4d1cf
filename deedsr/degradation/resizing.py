"""Bilinear, bicubic and area resizing as torch's `F.interpolate` defines them, without antialiasing, exactly summed."""

from functools import lru_cache

import cv2
import numpy as np
from scipy.sparse import csr_array

from deedsr.degradation.fixed_point import exact_bits, largest, operand, weight_rows

RESIZE_MODES = ("area", "bilinear", "bicubic")
_GAIN = {"area": 1.0, "bilinear": 1.0, "bicubic": 1.376}  # largest sum of the magnitudes of a pixel's weights
_CUBIC = -0.75  # torch's and OpenCV's bicubic


def resample(image: np.ndarray, mode: str, size: tuple[int, int], step: tuple[float, float]) -> np.ndarray:
    """Resize a three-channel image (uint8 or pixels of `fixed_point`) to `size` (height, width); returns pixels.

    `step` is how far neighbouring output pixels lie apart in the image (down, across); area needs none.
    """
    height, width, channels = image.shape
    whole, unit = operand(image)
    gain = _GAIN[mode]
    bits = exact_bits(unit * largest(whole), gain * gain)
    down = _matrix(mode, height, size[0], step[0], bits, 1, unit)
    across = _matrix(mode, width, size[1], step[1], bits, channels)
    rows = down @ whole.reshape(height, -1)
    columns = across @ cv2.transpose(np.rint(rows, out=rows))
    return cv2.transpose(np.rint(columns, out=columns)).reshape(*size, channels)


def _matrix(mode: str, length: int, count: int, step: float, bits: int, interleaved: int, unit: int = 1) -> csr_array:
    """Resizes columns, in each of which so many lines are interleaved, from `length` to `count` elements of each."""
    index, weights = _taps(mode, length, count, step, bits)
    index = index[:, None] * interleaved + np.arange(interleaved, dtype=np.int32)[:, None]  # output, line, tap
    weights = np.repeat(weights[:, None] * np.float32(unit), interleaved, axis=1)
    ends = np.arange(0, index.size + 1, index.shape[2], dtype=np.int32)
    return csr_array((weights.ravel(), index.ravel(), ends), shape=(count * interleaved, length * interleaved))


@lru_cache(maxsize=64)  # crops are square as a rule
def _taps(mode: str, length: int, count: int, step: float, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (int32) and whole multiples of 2^-bits (float32), both (count, taps), that make each output element."""
    index, weights = _area(length, count) if mode == "area" else _interpolation(mode, length, count, step)
    return index.astype(np.int32), weight_rows(weights, bits).astype(np.float32)


def _area(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights (count, taps) of the mean over the pixels that each output pixel touches."""
    output = np.arange(count)
    first = output * length // count
    touched = (-(-(output + 1) * length // count) - first)[:, None]
    tap = np.arange(touched.max())
    return np.minimum(first[:, None] + tap, length - 1), np.where(tap < touched, 1 / touched, 0.0)


def _interpolation(mode: str, length: int, count: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights (count, taps) of the two or four pixels around each output pixel's place."""
    place = (np.arange(count) + 0.5) * step - 0.5
    if mode == "bilinear":
        place = np.maximum(place, 0.0)
    first = np.floor(place)
    t = place - first
    if mode == "bilinear":
        tap, weights = np.arange(2), [1 - t, t]
    else:
        tap, weights = np.arange(-1, 3), [_outer(1 + t), _inner(t), _inner(1 - t), _outer(2 - t)]
    return np.clip(first.astype(int)[:, None] + tap, 0, length - 1), np.stack(weights, axis=1)


def _inner(distance: np.ndarray) -> np.ndarray:
    return ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1


def _outer(distance: np.ndarray) -> np.ndarray:
    return _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
