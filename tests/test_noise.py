"""Noise fields against the distributions they stand for."""

import cv2
import numpy as np
import plain_degradation as plain
import pytest
from scipy import stats

from deedsr.degradation import noise
from deedsr.degradation.fixed_point import to_pixels


@pytest.fixture(scope="module")
def crops(photos):
    """256 px crops of the shipped photographs."""
    images = [cv2.imread(str(name))[..., ::-1] for name in sorted((photos / "train").glob("*.jpg"))]
    return [np.ascontiguousarray(image[300:556, 400:656]) for image in images]


def test_gaussian_noise_is_normal_and_gray_noise_is_one_field():
    image = np.zeros((200, 200, 3), np.float32)
    field = noise.add_gaussian(image, 7.0, False, 2**64 - 1) / (7 * 64)
    assert stats.kstest(field.ravel(), stats.norm.cdf).pvalue > 1e-4
    assert field.std() == pytest.approx(1, abs=0.01)
    assert stats.kurtosis(field.ravel()) == pytest.approx(0, abs=0.06)
    assert np.abs(np.corrcoef(field.reshape(-1, 3).T) - np.eye(3)).max() < 0.025
    for neighbour in (field[1:] * field[:-1], field[:, 1:] * field[:, :-1]):
        assert abs(neighbour.mean()) < 0.015
    gray = noise.add_gaussian(image, 7.0, True, 3) / 64
    assert gray.std() == pytest.approx(7, rel=0.03)
    assert np.array_equal(gray[..., 0], gray[..., 1])
    assert np.array_equal(gray[..., 0], gray[..., 2])
    assert not np.array_equal(noise.add_gaussian(image, 7.0, True, 4) / 64, gray)


@pytest.mark.parametrize("photons", [2, 64, 128, 256])
def test_photon_counts_are_poisson_at_every_level(photons):
    """Over all 65,536 values of the random bits, so that nothing is left to chance."""
    bits = np.arange(65536, dtype=np.uint16)
    for level in (0, 1, 3, 8, 14, 15, 16, 17, 33, 40, 129, 200, 255):
        mean = level * photons / 255
        counts = noise.poisson_counts(np.full(65536, level, np.uint8), photons, bits)
        assert counts.min() >= 0
        assert np.array_equal(counts, np.rint(counts))
        assert counts.mean() == pytest.approx(mean, abs=1e-3)
        assert counts.var() == pytest.approx(mean, rel=1e-3)
        seen = np.bincount(counts.astype(int)) / 65536
        exact = stats.poisson(mean)
        assert np.abs(np.cumsum(seen) - exact.cdf(np.arange(len(seen)))).max() < 1e-3
        assert np.abs(seen - exact.pmf(np.arange(len(seen)))).sum() / 2 < 2e-3


@pytest.mark.parametrize("gray", [False, True])
def test_poisson_noise_agrees_with_the_plain_samplers_at_dark_and_bright_pixels(crops, gray):
    image = crops[2].astype(np.float32)
    level = image @ np.array([0.299, 0.587, 0.114], np.float32) if gray else image
    bgr = to_pixels(np.ascontiguousarray(crops[2][..., ::-1]))
    ours = np.stack([(noise.add_poisson(bgr, 1.5, gray, seed) - bgr)[..., ::-1] / 64 for seed in range(12)])
    exact = np.stack([plain.noise(image, "poisson", gray, seed, scale=1.5) + 0 * image for seed in range(12)])
    edges = np.quantile(level, [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1])
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (level >= low) & (level < high)
        a, b = ours[:, inside], exact[:, inside]
        assert a.std() == pytest.approx(b.std(), rel=0.02)
        assert a.mean() == pytest.approx(b.mean(), abs=0.05 * b.std())
        assert stats.skew(a, axis=None) == pytest.approx(stats.skew(b, axis=None), abs=0.06)
