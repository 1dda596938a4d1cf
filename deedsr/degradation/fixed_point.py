"""Arithmetic that gives the same bytes on every processor: sums that floating point does not round.

Between the steps of the chain a pixel is a float32 that holds its distance from mid-grey (128 levels) as a whole number
of 64ths of a level, BGR, or an image is still uint8. Weights of blurs and resizes are whole multiples of a power of two,
chosen so that no sum of products needs more than the 24 bits that a float32 holds. Then every product and every partial
sum is exact, and instruction sets, fused multiply-adds, the order of summation and the number of threads cannot show,
whichever library does the sum. The sums are rounded to whole 64ths again.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

__all__ = ["GRID", "exact_bits", "settle", "symmetric_weights", "to_levels", "to_pixels", "weight_rows"]

GRID = 1 / 64  # levels
_MID = 128.0
_MOST_BITS = 16


def to_pixels(image: np.ndarray) -> np.ndarray:
    """Float32 distances from mid-grey of a uint8 image; an image that holds them already is returned as it is."""
    return np.subtract(image, np.float32(_MID), dtype=np.float32) if image.dtype == np.uint8 else image


def to_levels(image: np.ndarray) -> np.ndarray:
    """Round to uint8 and saturate."""
    if image.dtype == np.uint8:
        return image
    return cv2.convertScaleAbs(np.maximum(image, np.float32(-_MID)), beta=_MID)


def settle(image: np.ndarray, grid: float = GRID) -> np.ndarray:
    """Round a float32 image to whole multiples of `grid`, a power of two, in place."""
    rounding = np.float32(1.5 * 2**23 * grid)  # a float32 of this size has no finer digits
    image += rounding
    image -= rounding
    return image


def exact_bits(image: np.ndarray, gain: float, grid: float = GRID) -> int:
    """Bits behind the binary point for weights whose magnitudes sum to `gain`, so that sums over `image` are exact.

    `image` is uint8 or holds whole multiples of `grid`.
    """
    largest = _MID if image.dtype == np.uint8 else max(cv2.norm(image, cv2.NORM_INF) / grid, 1.0)
    return min(math.frexp(2**24 / (largest * gain))[1] - 1, _MOST_BITS)


def weight_rows(weights: np.ndarray, bits: int) -> np.ndarray:
    """Rows of weights (float64, each row sums to 1) as whole multiples of 2^-bits that sum to exactly 1 (float32).

    It is the cumulative sums that are rounded: the error of a weight makes up for its neighbour's, so that what is left
    acts on differences of neighbouring pixels only.
    """
    one = 2**bits
    sums = np.rint(np.add.accumulate(weights, axis=-1) * one)
    sums[..., -1] = one
    return (np.diff(sums, prepend=0) / one).astype(np.float32)


def symmetric_weights(kernel: np.ndarray, image: np.ndarray, grid: float = GRID) -> np.ndarray:
    """Weights of a kernel that is symmetric about its centre and sums to 1, for exact sums over `image`.

    Rounded as by `weight_rows`, from the edges inwards; the centre takes what is left.
    """
    flat = kernel.ravel()
    half = len(flat) // 2
    gain = math.fsum(np.abs(flat))
    bits = exact_bits(image, gain, grid)
    while True:
        one = 2**bits
        edge = np.diff(np.rint(np.add.accumulate(flat[:half]) * one), prepend=0)
        whole = np.concatenate([edge, [one - 2 * edge.sum()], edge[::-1]])
        if exact_bits(image, np.abs(whole).sum() / one, grid) >= bits:
            return (whole / one).astype(np.float32).reshape(kernel.shape)
        bits -= 1  # rounding has raised the sum of the magnitudes over the limit
