"""No speed-up changes a distribution: the package's chain against its plain transcription, over independent draws.

Kolmogorov-Smirnov and chi-square tests, all of them together after Holm. `make soak` makes 2,000 draws of each arm.
"""

import cv2
import numpy as np
import plain_degradation as plain
import pytest
from scipy import stats

from deedsr.dataset.keys import generator
from deedsr.dataset.recipe import load_recipe
from deedsr.degradation import chain, degrade, draw_degradation, noise
from deedsr.degradation.fixed_point import PER_LEVEL, symmetric_weights, to_pixels
from deedsr.degradation.kernels import KERNELS

SIDE = 128
RANGES = load_recipe("deedsr").degradation
COUNTS = [pytest.param(250, id="250"), pytest.param(2000, id="2000", marks=pytest.mark.soak)]


@pytest.fixture(scope="module")
def crops(photos):
    images = [cv2.imread(str(name))[..., ::-1] for name in sorted((photos / "train").glob("*.jpg"))]
    return [np.ascontiguousarray(image[top : top + SIDE, 400 : 400 + SIDE]) for image in images for top in (200, 500)]


def assert_alike(p_values):
    """None is below 0.01 after Holm."""
    ascending = sorted(p_values.items(), key=lambda item: item[1])
    adjusted = [(name, p * (len(ascending) - rank)) for rank, (name, p) in enumerate(ascending)]
    assert all(p > 0.01 for _, p in adjusted), adjusted[:5]


def compare(ours, plains):
    """p of each statistic, given as one dictionary per draw, of two arms."""
    return {name: stats.ks_2samp([row[name] for row in ours], [row[name] for row in plains]).pvalue for name in ours[0]}


def describe(lr):
    """Mean, variance, spectrum and blockiness of an LR image, and what is noise in its colours."""
    grey = lr.astype(float) @ [0.299, 0.587, 0.114]
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(side) for side in grey.shape], indexing="ij"))
    step = np.abs(np.diff(grey, axis=1)).mean(0)
    border = np.arange(len(step)) % 8 == 7
    found = {f"mean {name}": lr[..., channel].mean() for channel, name in enumerate("rgb")}
    found |= {f"variance {name}": lr[..., channel].var() for channel, name in enumerate("rgb")}
    for low, high in ((0, 0.125), (0.125, 0.25), (0.25, 0.375), (0.375, 0.75)):
        found[f"power {low} to {high}"] = power[(frequency > low) & (frequency <= high)].mean()
    found["blockiness"] = step[border].mean() / (step[~border].mean() + 0.01)
    found["colour noise"] = np.diff(lr[..., 0].astype(float) - lr[..., 1], axis=0).var()
    return found


def draws_of(arm, count, ranges=RANGES):
    return [draw_degradation(ranges, (SIDE, SIDE), 4, generator("distribution", arm, i)) for i in range(count)]


@pytest.mark.parametrize("recipe", ["deedsr", "realesrgan"])
@pytest.mark.parametrize("count", COUNTS)
def test_lr_images_have_the_plain_chains_statistics(crops, recipe, count):
    ranges = load_recipe(recipe).degradation
    ours = [describe(degrade(crops[i % len(crops)], d)) for i, d in enumerate(draws_of("ours", count, ranges))]
    plains = [describe(plain.degrade(crops[i % len(crops)], d)) for i, d in enumerate(draws_of("plain", count, ranges))]
    assert_alike(compare(ours, plains))


@pytest.mark.parametrize("count", COUNTS)
def test_kernels_have_the_plain_kernels_widths_and_heights(count):
    """The weights as used, after cutting and rounding."""

    def shape(kernel):
        half = kernel.shape[0] // 2
        axis = np.arange(kernel.shape[0]) - half
        return {"centre": kernel[half, half], "energy": (kernel**2).sum(), "width": (kernel * axis**2).sum()}

    def used(kernel, size, **parameters):
        weights = symmetric_weights(chain._significant(chain.blur_kernel(kernel, size, **parameters)), 128)
        margins = [((21 - side) // 2,) * 2 for side in weights.shape]
        return np.pad(weights, margins)

    def blurs(arm):
        return [step for draw in draws_of(arm, 3 * count) for step in draw["steps"] if step["step"] == "blur1"]

    p_values = {}
    for kernel in KERNELS:
        arms = []
        for arm, build in (("ours", used), ("plain", plain.kernel_21)):
            steps = [{k: v for k, v in step.items() if k != "step"} for step in blurs(arm) if step["kernel"] == kernel]
            arms.append([shape(build(**step)) for step in steps])
        for step in steps:  # and kernel by kernel
            assert np.abs(used(**step) - plain.kernel_21(**step)).sum() < 0.005 * np.abs(plain.kernel_21(**step)).sum()
        p_values |= {(kernel, name): p for name, p in compare(*arms).items()}
    assert_alike(p_values)


@pytest.mark.parametrize("count", COUNTS)
def test_noise_has_the_plain_noises_moments_at_every_level_in_every_channel(count):
    """Over all levels at once, so that white stands for 256 photons; dark, middle and bright ones apart."""
    level = np.repeat(np.random.default_rng(0).permutation(np.arange(256).repeat(4)).reshape(32, 32, 1), 3, axis=2)
    image = level.astype(np.uint8)
    bands = {"dark": level[..., 0] < 24, "middle": abs(level[..., 0] - 128) < 40, "bright": level[..., 0] > 215}

    def moments(field):
        found = {}
        for name, inside in bands.items():
            values = field[inside]
            for channel in range(3):
                found[name, channel, "mean"] = values[:, channel].mean()
                found[name, channel, "deviation"] = values[:, channel].std()
            found[name, "skewness"] = (((values[:, 0] - values[:, 0].mean()) / values[:, 0].std()) ** 3).mean()
            found[name, "channels together"] = np.mean(values[:, 0] * values[:, 1])
        return found

    def fields(arm, family, gray):
        rng = generator("noise", arm, family, gray)
        for _ in range(count):
            strength = {"sigma": rng.uniform(1, 15)} if family == "gaussian" else {"scale": rng.uniform(0.05, 2)}
            seed = int(rng.integers(2**63))
            if arm == "plain":
                field = plain.noise(image.astype(np.float32), family, gray, seed, **strength) + np.zeros((1, 1, 3))
            else:
                add = noise.add_gaussian if family == "gaussian" else noise.add_poisson
                pixels = to_pixels(image)
                field = (add(pixels, gray=gray, seed=seed, **strength) - pixels)[..., ::-1] / PER_LEVEL
            yield field / next(iter(strength.values()))

    p_values = {}
    for family in ("gaussian", "poisson"):
        for gray in (False, True):
            arms = [[moments(field) for field in fields(arm, family, gray)] for arm in ("ours", "plain")]
            p_values |= {(family, gray, *name): p for name, p in compare(*arms).items()}
    assert_alike(p_values)


@pytest.mark.parametrize("count", COUNTS)
def test_each_resize_mode_has_the_plain_ones_spectrum(crops, count):
    p_values = {}
    for mode in ("area", "bilinear", "bicubic"):
        factors = {arm: generator("resize", arm, mode).uniform(0.3, 1.5, count // 2) for arm in ("ours", "plain")}
        ours = [
            describe(chain.to_levels(chain.rescale(crops[i % len(crops)], mode, factor)))
            for i, factor in enumerate(factors["ours"])
        ]
        plains = [
            describe(np.rint(plain.interpolate(crops[i % len(crops)].astype(np.float32), mode, scale_factor=factor)))
            for i, factor in enumerate(factors["plain"])
        ]
        p_values |= {(mode, name): p for name, p in compare(ours, plains).items()}
    assert_alike(p_values)


@pytest.mark.parametrize("count", COUNTS)
def test_qualities_and_modes_are_drawn_evenly(count):
    steps = [{step["step"]: step for step in draw["steps"]} for draw in draws_of("ours", count) if not draw["clean"]]
    p_values = {}
    for name, low, high in (("jpeg1", 60, 95), ("jpeg2", 60, 100)):
        seen = np.bincount([step[name]["quality"] - low for step in steps], minlength=high - low + 1)
        assert len(seen) == high - low + 1
        p_values[name] = stats.chisquare(seen).pvalue
    for name in ("resize1", "resize2", "resize3"):
        modes = [step[name]["mode"] for step in steps]
        p_values[name] = stats.chisquare([modes.count(mode) for mode in ("area", "bilinear", "bicubic")]).pvalue
    assert_alike(p_values)
