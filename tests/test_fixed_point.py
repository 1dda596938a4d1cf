"""Sums are exact, tables are clear of rounding boundaries, and elementary functions are what they are called."""

import math

import cv2
import numpy as np
import pytest
from degradation_bytes import picture
from scipy import special

from deedsr.dataset.keys import generator
from deedsr.dataset.recipe import load_recipe
from deedsr.degradation import chain, draw_degradation, fixed_point, kernels, noise, resizing

WORST = np.where(generator("worst").random((40, 50, 3)) < 0.5, 0, 255).astype(np.uint8)


def in_integers(whole, weights):
    """The correlation in 64-bit integers; weights are whole multiples of 2^-16."""
    scaled = np.round(weights.astype(np.float64) * 2**16).astype(np.int64)
    assert np.array_equal(scaled / 2**16, weights)
    rows, columns = weights.shape
    padded = np.pad(whole, ((rows // 2,) * 2, (columns // 2,) * 2, (0, 0)), mode="reflect").astype(np.int64)
    total = np.zeros(whole.shape, np.int64)
    for top, left in np.ndindex(rows, columns):
        total += scaled[top, left] * padded[top : top + whole.shape[0], left : left + whole.shape[1]]
    return np.rint(total / 2**16)


@pytest.mark.parametrize("recipe", ["deedsr", "heavy"])
@pytest.mark.parametrize(
    "image", [WORST, picture(40, 50, 3), resizing.resample(WORST, "bicubic", (36, 44), (1.1, 1.1))]
)
def test_blurs_are_integer_sums(recipe, image):
    checked = []
    convolve = chain.correlate

    def checking(whole, weights):
        blurred = convolve(whole, weights)
        bits = next(bits for bits in range(17) if np.array_equal(np.rint(weights * 2**bits), weights * 2**bits))
        assert np.abs(whole).max() * np.abs(weights).sum() * 2**bits <= 2**24
        assert np.array_equal(blurred, in_integers(whole, weights))
        checked.append(weights.size)
        return blurred

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "correlate", checking)
        for index in range(40):
            ranges = load_recipe(recipe).degradation
            for step in draw_degradation(ranges, (64, 64), 4, generator("sum", index))["steps"]:
                if step["step"] in ("blur1", "sinc"):
                    chain.blur(image, **{key: value for key, value in step.items() if key != "step"})
    assert max(checked) == 441


@pytest.mark.parametrize("mode", resizing.RESIZE_MODES)
def test_resizes_are_integer_sums(mode):
    for image in (WORST, resizing.resample(WORST, "bicubic", (36, 44), (1.1, 1.1))):
        for factor in (0.3, 0.71, 1.37):
            size = (int(image.shape[0] * factor), int(image.shape[1] * factor))
            whole, unit = fixed_point.operand(image)
            expected = whole.astype(np.float64) * unit
            bits = fixed_point.exact_bits(np.abs(expected).max(), resizing._GAIN[mode] ** 2)
            for axis in (0, 1):
                matrix = resizing._matrix(mode, image.shape[axis], size[axis], 1 / factor, bits, 1).toarray()
                assert np.array_equal(matrix * 2**bits, np.rint(matrix * 2**bits))
                assert np.array_equal(matrix.sum(axis=1), np.ones(size[axis]))
                assert np.abs(expected).max() * np.abs(matrix).sum(axis=1).max() * 2**bits <= 2**24
                expected = np.rint(np.moveaxis(np.tensordot(matrix.astype(np.float64), expected, (1, axis)), 0, axis))
            result = resizing.resample(image, mode, size, (1 / factor, 1 / factor))
            assert np.array_equal(result, expected)


def test_weights_keep_the_sum_and_the_symmetry_of_a_kernel_and_follow_it_closely():
    for size, cutoff in ((21, 1.1), (13, 2.9), (7, math.pi)):
        kernel = chain.blur_kernel("sinc", size, cutoff=cutoff)
        weights = fixed_point.symmetric_weights(kernel, 128)
        assert weights.sum() == 1
        assert np.array_equal(weights, weights[::-1, ::-1])
        assert np.abs(weights - kernel).max() < 2**-12


def test_tables_are_clear_of_rounding_boundaries():
    """By far more than the last bits in which the C libraries' functions differ."""
    quantiles = special.ndtri(noise._PROBABILITIES)
    scaled = quantiles / quantiles.std() * 65536
    assert np.abs(scaled - np.floor(scaled) - 0.5).min() > 1000 * np.spacing(np.abs(scaled).max())
    for photons in 2 ** np.arange(9):
        means = [level * photons / 255 for level in range(256)]
        cumulated = special.pdtr(np.arange(64), np.array([m for m in means if m < noise._FEW_PHOTONS])[:, None])
        gap = np.abs(cumulated[cumulated < 1 - 1e-9] * 65536 - 0.5)
        assert np.abs(gap - np.rint(gap)).min() > 1e-8


def test_elementary_functions_are_accurate():
    x = np.linspace(-60, 60, 10001)
    assert np.allclose(kernels.exp(x), np.exp(x), rtol=1e-11, atol=0)
    assert np.allclose(kernels.log(np.exp(x)), x, rtol=0, atol=1e-11)
    assert np.allclose(kernels.sine(x), np.sin(x), rtol=0, atol=1e-11)
    for largest in (0.5, 7, 45, 120):
        radius = np.linspace(0, largest, 1001)
        assert np.allclose(kernels.bessel_j1(radius), special.j1(radius), rtol=0, atol=1e-9)


def test_whole_levels_survive_and_others_are_rounded_and_saturated():
    image = picture(16, 16, 1)
    assert np.array_equal(fixed_point.to_levels(fixed_point.to_pixels(image)), image)
    pixels = np.array([[[-9000, -8192 + 31, 8129]]], np.float32)
    assert fixed_point.to_levels(pixels).ravel().tolist() == [0, 0, 255]
    assert cv2.norm(fixed_point.to_pixels(image), cv2.NORM_INF) <= 8192
