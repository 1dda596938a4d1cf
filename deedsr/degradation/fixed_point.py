"""Arithmetic that gives the same bytes on every processor: sums that floating point does not round.

Between the steps of the chain an image is uint8, or "pixels": float32 arrays of whole numbers, distances from mid-grey
(level 128) in 64ths of a level, BGR. Weights of blurs and resizes are whole multiples of a power of two, chosen so that
no sum of products needs more than the 24 bits that a float32 holds. Then every product and every partial sum is exact,
and instruction sets, fused multiply-adds, the order of summation and the number of threads cannot show, whichever
library does the sum. The sums are rounded to whole numbers again.
"""

import math

import cv2
import numpy as np

PER_LEVEL = 64
MID = 128
BLACK, WHITE = -MID * PER_LEVEL, (255 - MID) * PER_LEVEL  # as pixels
_COARSE = 8
_MOST_BITS = 16


def operand(image: np.ndarray, coarse: bool = False) -> tuple[np.ndarray, int]:
    """Whole numbers to be multiplied with weights (float32) and how many 64ths of a level each of them stands for.

    `coarse` rounds pixels to eighths of a level, which leaves more bits for the weights.
    """
    if image.dtype == np.uint8:
        levels = image.astype(np.float32)
        levels -= MID
        return levels, PER_LEVEL
    return (np.rint(image * np.float32(1 / _COARSE)), _COARSE) if coarse else (image, 1)


def to_pixels(image: np.ndarray) -> np.ndarray:
    """An image as pixels."""
    whole, unit = operand(image)
    return whole if unit == 1 else whole * np.float32(unit)


def to_levels(image: np.ndarray) -> np.ndarray:
    """An image as uint8: rounded and saturated."""
    if image.dtype == np.uint8:
        return image
    return cv2.convertScaleAbs(np.clip(image, BLACK, WHITE), alpha=1 / PER_LEVEL, beta=MID)


def largest(whole: np.ndarray) -> float:
    """Largest magnitude in an array."""
    return max(cv2.norm(whole, cv2.NORM_INF), 1.0)


def exact_bits(largest: float, gain: float) -> int:
    """Bits behind the binary point for weights whose magnitudes sum to `gain`, so that their sums are exact.

    `largest` is the largest whole number that they are multiplied with.
    """
    return min(math.frexp(2**24 / (largest * gain))[1] - 1, _MOST_BITS)


def weight_rows(weights: np.ndarray, bits: int) -> np.ndarray:
    """Rows of weights (float64, each row sums to 1) as whole multiples of 2^-bits that sum to exactly 1.

    It is the cumulative sums that are rounded: the error of a weight makes up for its neighbour's, so that what is left
    acts on differences of neighbouring pixels only.
    """
    one = 2**bits
    sums = np.rint(np.add.accumulate(weights, axis=-1) * one)
    sums[..., -1] = one
    return np.diff(sums, prepend=0) / one


def symmetric_weights(kernel: np.ndarray, largest: float) -> np.ndarray:
    """Weights of a kernel that is symmetric about its centre and sums to 1, such that their sums are exact.

    `largest` is the largest whole number that they are multiplied with. Rounded as by `weight_rows`, from the edges
    inwards; the centre takes what is left.
    """
    flat = kernel.ravel()
    half = len(flat) // 2
    bits = exact_bits(largest, math.fsum(np.abs(flat).tolist()))
    while True:
        one = 2**bits
        edge = np.diff(np.rint(np.add.accumulate(flat[:half]) * one), prepend=0)
        weights = np.concatenate([edge, [one - 2 * edge.sum()], edge[::-1]]) / one
        if exact_bits(largest, math.fsum(np.abs(weights).tolist())) >= bits:
            return weights.reshape(kernel.shape)
        bits -= 1  # rounding has raised the sum of the magnitudes over the limit
