"""Gaussian and Poisson noise fields from a 64-bit seed.

Both start from a table of normal quantiles at 16 uniform random bits per value: four to ten times the speed of numpy's
samplers, which are exact where this is exact to 1e-3 in probability for Poisson counts and to 2^-17 for normal values
(whose tails end at 4.2 standard deviations). Mean and variance are exact. Noise is only ever seen after rounding to
8-bit levels.
"""

from functools import lru_cache

import cv2
import numpy as np
from scipy.special import ndtri, pdtr

from deedsr.degradation.fixed_point import BLACK, PER_LEVEL, WHITE, to_levels

_PROBABILITIES = (np.arange(65536) + 0.5) / 65536
_GRAY = np.array([[233, 1202, 613]], np.float32) / 2048  # of BGR; for pixels in range, exact sums
_FEW_PHOTONS = 16  # below this mean, counts come from their own quantiles


def add_gaussian(image: np.ndarray, sigma: float, gray: bool, seed: int) -> np.ndarray:
    """Add normal noise of `sigma` 8-bit levels to pixels of `fixed_point`; gray: the same in all channels."""
    height, width = image.shape[:2]
    values = np.rint(_normal_quantiles() * (sigma * PER_LEVEL))
    field = cv2.LUT(_random_bits((height, width) if gray else (height, width, 3), seed), values)
    return image + (cv2.cvtColor(field, cv2.COLOR_GRAY2BGR) if gray else field)


def add_poisson(image: np.ndarray, scale: float, gray: bool, seed: int) -> np.ndarray:
    """Add `scale` times the shot noise of the image itself to pixels of `fixed_point`.

    As in the reference, white stands for 2^ceil(log2(distinct 8-bit levels in the image)) photons; gray: the noise of
    the grey image goes to all channels.
    """
    level = to_levels(cv2.transform(np.clip(image, BLACK, WHITE), _GRAY) if gray else image)
    distinct = np.count_nonzero(cv2.calcHist([level.reshape(-1)], [0], None, [256], [0, 256]))
    photons = 1 << int(distinct - 1).bit_length()
    noise = poisson_counts(level, photons, _random_bits(level.shape, seed))
    noise *= scale * PER_LEVEL * 255 / photons
    noise -= level * np.float32(scale * PER_LEVEL)
    np.rint(noise, out=noise)
    return image + (cv2.cvtColor(noise, cv2.COLOR_GRAY2BGR) if gray else noise)


def poisson_counts(level: np.ndarray, photons: int, bits: np.ndarray) -> np.ndarray:
    """Photons counted where level / 255 * photons are expected, by 16 random bits for each: whole numbers in float32.

    The Cornish-Fisher expansion m + s z + (z^2 - 1) / 6 of the quantiles around the mean m, rounded; s^2 = m - 5/36
    makes up for the variance of rounding (1/12) and of the quadratic term (1/18). It fails for small means: those few
    levels have tables.
    """
    mean = np.arange(256) * (photons / 255)
    z = cv2.LUT(bits, _normal_quantiles())
    counts = z * np.float32(1 / 6)
    counts += cv2.LUT(level, np.sqrt(np.maximum(mean - 5 / 36, 0)).astype(np.float32))
    counts *= z
    counts += cv2.LUT(level, (mean - 1 / 6).astype(np.float32))
    np.rint(counts, out=counts)

    tables = _few_photons(photons)
    dark = np.flatnonzero(level < len(tables))
    place = level.reshape(-1).take(dark).astype(np.intp) * 65536 + bits.reshape(-1).take(dark)
    counts.reshape(-1)[dark] = tables.reshape(-1).take(place).astype(np.float32)
    return counts


def _random_bits(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """uint16 array of independent uniform values. The bit stream of a seed is fixed across numpy versions."""
    count = int(np.prod(shape))
    words = np.random.SFC64(seed).random_raw(-(-count // 4))
    return words.astype("<u8", copy=False).view("<u2")[:count].reshape(shape)


@lru_cache(maxsize=1)
def _normal_quantiles() -> np.ndarray:
    """float32 quantiles of the standard normal at 65,536 midpoints, scaled to unit variance.

    Whole multiples of 2^-16: the last bit of scipy's function is the processor's, and no value lies near a rounding
    boundary.
    """
    quantiles = ndtri(_PROBABILITIES)
    return (np.rint(quantiles / quantiles.std() * 65536) / 65536).astype(np.float32)


@lru_cache(maxsize=4)
def _few_photons(photons: int) -> np.ndarray:
    """uint8 quantiles at 65,536 midpoints, a row for each 8-bit level whose mean count is small (1 MB as a rule)."""
    levels = [level for level in range(256) if level * photons / 255 < _FEW_PHOTONS]
    table = np.empty((len(levels), 65536), np.uint8)
    for level in levels:
        table[level] = np.searchsorted(pdtr(np.arange(64), level * photons / 255), _PROBABILITIES)
    return table
