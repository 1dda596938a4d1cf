"""Blur kernels of the degradation chain, at their true size (docs/method.md, degradation).

Each function returns a float64 array of shape (size, size), `size` odd, that sums to 1 and is symmetric about its
centre; the same bits on every processor. The reference pads every kernel to 21x21 with zeros, which changes nothing but
the cost. Widths are in pixels, angles in radians.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from deedsr.degradation.elementary import bessel_j1, exp, log, sine

__all__ = ["KERNELS", "blur_kernel", "gaussian", "generalized_gaussian", "plateau", "profile", "sinc"]

# Every kernel a draw can name; `scalar_parameters` gives the index.
KERNELS = (
    "isotropic",
    "anisotropic",
    "generalized_isotropic",
    "generalized_anisotropic",
    "plateau_isotropic",
    "plateau_anisotropic",
    "sinc",
)


def profile(size: int, sigma: float) -> np.ndarray:
    """The Gaussian of which the isotropic one is the product along columns and rows; shape (size,)."""
    axis = _axis(size) / sigma
    return _normalised(exp(-0.5 * axis * axis))


def gaussian(size: int, sigma_x: float, sigma_y: float, theta: float) -> np.ndarray:
    """Gaussian with widths `sigma_x`, `sigma_y` along axes turned by `theta`."""
    return _normalised(exp(-0.5 * _distance(size, sigma_x, sigma_y, theta)))


def generalized_gaussian(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> np.ndarray:
    """exp(-d^beta / 2) with d the squared distance in widths: peaked for beta < 1, flat-topped for beta > 1."""
    return _normalised(exp(-0.5 * _power(_distance(size, sigma_x, sigma_y, theta), beta)))


def plateau(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> np.ndarray:
    """1 / (1 + d^beta) with d the squared distance in widths: long tails."""
    return _normalised(1 / (1 + _power(_distance(size, sigma_x, sigma_y, theta), beta)))


def sinc(size: int, cutoff: float) -> np.ndarray:
    """Circular low-pass filter (rings and overshoots) that ends at `cutoff`, in (0, pi] radians per pixel."""
    radius, place = _radii(size)
    values = cutoff * bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    values[0] = cutoff * cutoff / (4 * math.pi)  # the limit at zero
    return _normalised(values[place])


@lru_cache
def _radii(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The few dozen distances from the centre that occur, 1 in place of 0, and which of them each element has."""
    axis = _axis(size)
    squares, place = np.unique(axis[:, None] ** 2 + axis**2, return_inverse=True)
    return np.sqrt(np.maximum(squares, 1)), place.reshape(size, size)


def blur_kernel(kernel: str, size: int, **parameters: float) -> np.ndarray:
    """The kernel that a draw describes: one of `KERNELS`, its size, and the parameters of its function above."""
    match kernel.split("_")[0]:
        case "isotropic" | "anisotropic":
            return gaussian(size, **parameters)
        case "generalized":
            return generalized_gaussian(size, **parameters)
        case "plateau":
            return plateau(size, **parameters)
        case "sinc":
            return sinc(size, **parameters)
    raise ValueError(f"unknown blur kernel {kernel!r}; known: {', '.join(KERNELS)}")


def _axis(size: int) -> np.ndarray:
    if size % 2 == 0 or size < 1:
        raise ValueError(f"a kernel's size must be odd and positive, got {size}")
    return np.arange(size, dtype=np.float64) - size // 2


def _distance(size: int, sigma_x: float, sigma_y: float, theta: float) -> np.ndarray:
    """Squared Mahalanobis distance from the centre."""
    y, x = _axis(size)[:, None], _axis(size)
    sin, cos = sine(np.array([theta, theta + math.pi / 2]))
    along = (x * cos + y * sin) / sigma_x
    across = (y * cos - x * sin) / sigma_y
    return along * along + across * across


def _power(distance: np.ndarray, beta: float) -> np.ndarray:
    return exp(beta * log(np.maximum(distance, 1e-300)))


def _normalised(kernel: np.ndarray) -> np.ndarray:
    return kernel / math.fsum(kernel.ravel().tolist())
