"""Blur kernels of the degradation chain, at their true size (docs/method.md, degradation).

Each function returns a float64 array of shape (size, size), `size` odd, that sums to 1 and is symmetric about its
centre; the same bits on every processor. The reference pads every kernel to 21x21 with zeros, which changes nothing but
the cost. Widths are in pixels, angles in radians.
"""

import math
from functools import lru_cache, reduce

import numpy as np

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


# exp, log, sine and a Bessel function that give the same bits on every processor. The C library's and numpy's own
# differ in the last bit between instruction sets, which a rounded kernel weight could show. These use only operations
# that IEEE 754 rounds in one way: +, -, *, / and moving the exponent. Each is accurate to about 1e-11, far more than
# the weights need. Arguments and results are float64 arrays.

_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10  # together ln 2; 32 bits in the first
_EXP = [1 / math.factorial(power) for power in range(11, -1, -1)]
_ATANH = [1 / (2 * power + 1) for power in range(6, -1, -1)]
_SINE = [(-1) ** power / math.factorial(2 * power + 1) for power in range(9, -1, -1)]


def exp(x: np.ndarray) -> np.ndarray:
    """e^x for x up to 700; below -600 as at -600."""
    x = np.maximum(x, -600.0)
    twos = np.rint(x / (_LN2_HIGH + _LN2_LOW))
    rest = (x - twos * _LN2_HIGH) - twos * _LN2_LOW
    return np.ldexp(np.polyval(_EXP, rest), twos.astype(np.int32))


def log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive numbers."""
    mantissa, twos = np.frexp(x)
    small = mantissa < 0.7
    mantissa, twos = np.where(small, 2 * mantissa, mantissa), np.where(small, twos - 1, twos)
    ratio = (mantissa - 1) / (mantissa + 1)
    return twos * (_LN2_HIGH + _LN2_LOW) + 2 * ratio * np.polyval(_ATANH, ratio * ratio)


def sine(x: np.ndarray) -> np.ndarray:
    """Sine of angles up to some hundred radians."""
    halves = np.rint(x / math.pi)
    rest = x - halves * math.pi
    return np.where(halves % 2 == 0, 1.0, -1.0) * rest * np.polyval(_SINE, rest * rest)


def bessel_j1(x: np.ndarray) -> np.ndarray:
    """Bessel function of the first kind of order 1, x >= 0: the trapezoidal rule on its integral over a period.

    The rule converges faster than any power of the number of nodes once it exceeds x (Abramowitz and Stegun 9.1.18).
    """
    nodes = int(x.max() / 4) + 10  # of a quarter period
    height = sine((np.arange(nodes) + 0.5) * (math.pi / (2 * nodes)))
    terms = height[:, None] * sine(np.multiply.outer(height, x.ravel()))
    return reduce(np.add, terms).reshape(x.shape) / nodes  # one after the other: the order of `sum` is the processor's
