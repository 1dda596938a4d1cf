"""Blur kernels of the degradation chain, at their true size (docs/method.md, degradation).

Each function returns a float32 array of shape (size, size), `size` odd, that sums to 1. The reference pads every kernel
to 21x21 with zeros, which changes nothing but the cost. Widths are in pixels, angles in radians.
"""

from __future__ import annotations

import numpy as np
from scipy.special import j1

__all__ = ["KERNELS", "blur_kernel", "gaussian", "generalized_gaussian", "plateau", "sinc"]

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


def gaussian(size: int, sigma_x: float, sigma_y: float, theta: float) -> np.ndarray:
    """Gaussian with widths `sigma_x`, `sigma_y` along axes turned by `theta`."""
    return _normalised(np.exp(-0.5 * _distance(size, sigma_x, sigma_y, theta)))


def generalized_gaussian(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> np.ndarray:
    """exp(-d^beta / 2) with d the squared distance in widths: peaked for beta < 1, flat-topped for beta > 1."""
    return _normalised(np.exp(-0.5 * _distance(size, sigma_x, sigma_y, theta) ** beta))


def plateau(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> np.ndarray:
    """1 / (1 + d^beta) with d the squared distance in widths: long tails."""
    return _normalised(1 / (1 + _distance(size, sigma_x, sigma_y, theta) ** beta))


def sinc(size: int, cutoff: float) -> np.ndarray:
    """Circular low-pass filter (rings and overshoots) that ends at `cutoff`, in (0, pi] radians per pixel."""
    y, x = _grid(size)
    radius = np.hypot(x, y)
    radius[size // 2, size // 2] = 1  # the limit at zero is set below
    kernel = cutoff * j1(cutoff * radius) / (2 * np.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * np.pi)
    return _normalised(kernel)


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


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    if size % 2 == 0 or size < 1:
        raise ValueError(f"a kernel's size must be odd and positive, got {size}")
    axis = np.arange(size, dtype=np.float64) - size // 2
    return axis[:, None], axis[None, :]


def _distance(size: int, sigma_x: float, sigma_y: float, theta: float) -> np.ndarray:
    """Squared Mahalanobis distance from the centre."""
    y, x = _grid(size)
    along = (x * np.cos(theta) + y * np.sin(theta)) / sigma_x
    across = (y * np.cos(theta) - x * np.sin(theta)) / sigma_y
    return along**2 + across**2


def _normalised(kernel: np.ndarray) -> np.ndarray:
    return (kernel / kernel.sum()).astype(np.float32)
