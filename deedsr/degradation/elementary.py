"""exp, log, sine and a Bessel function that give the same bits on every processor.

The C library's and numpy's own differ in the last bit from one instruction set to another, which a rounded kernel
weight could show. These use nothing but operations that IEEE 754 rounds in one way: +, -, *, /, and moving the
exponent. Each is accurate to about 1e-11, far more than the weights need. Arguments and results are float64 arrays.
"""

from __future__ import annotations

import math
from functools import reduce

import numpy as np

__all__ = ["bessel_j1", "exp", "log", "sine"]

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
