"""What the figures of `tiny` are measured on, and how: see benchmarks/tiny_figures.py."""

from collections import Counter

import cv2
import numpy as np
import pytest

from benchmarks.picture_measures import FLAT, consistency, interval, patch_deviations
from benchmarks.tiny_crops import COUNT, SHIPPED, SIDE, read_crops
from benchmarks.tiny_figures import DEGRADED, Pair, degraded, degrading, sampled
from deedsr import DeeDSRPipeline
from deedsr.dataset.assignment import assign_degradation
from tools.tiny.photographs import VALIDATION


@pytest.fixture(scope="module")
def crops():
    return read_crops()


def photograph(crop) -> str:
    return crop.name.split("-", 1)[1].rsplit("-", 2)[0]


def test_the_shipped_crops_are_textured_and_spread_over_the_validation_photographs(crops):
    assert [crop.hr.shape for crop in crops] == [(SIDE, SIDE, 3)] * COUNT
    for crop in crops:
        grey = cv2.cvtColor(crop.hr, cv2.COLOR_RGB2GRAY)
        assert grey.std() > 15
        assert cv2.Laplacian(grey, cv2.CV_64F).var() > 40
    shares = Counter(photograph(crop) for crop in crops)
    assert set(shares) == set(VALIDATION)
    assert set(VALIDATION) == {photograph(crop) for crop in crops[:6]}  # what --quick measures
    attribution = (SHIPPED / "ATTRIBUTION.md").read_text()
    assert all(f"-{name}-" in attribution for name in shares)


@pytest.mark.parametrize("ranges", ["deedsr", "realesrgan", "clean"])
def test_a_crop_is_degraded_the_same_way_each_time_and_by_its_own_draws(crops, ranges):
    first, again, other = (degraded(crop, ranges).lr for crop in (crops[0], crops[0], crops[1]))
    assert first.shape == (SIDE // 4, SIDE // 4, 3)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_ranges_draw_no_clean_lr(crops):
    recipes = [degrading(ranges) for ranges in DEGRADED]
    draws = [assign_degradation(recipe, crop.name, 0, (SIDE, SIDE)).draws for recipe in recipes for crop in crops]
    assert not any(drawn["clean"] for drawn in draws)


def test_the_clean_lr_is_consistent_with_its_hr_and_degraded_ones_are_not(crops):
    clean, noisy = degraded(crops[0], "clean"), degraded(crops[0], "realesrgan")
    assert consistency(crops[0].hr, clean.lr) > 55  # the LR was rounded
    assert consistency(crops[0].hr, noisy.lr) < 40


def test_flat_area_noise_sees_noise_and_no_shading():
    down, across = np.mgrid[:64, :64]
    shaded = np.repeat((60 + down + across)[..., None], 3, axis=2).astype(np.uint8)
    noisy = shaded + np.random.default_rng(0).normal(0, 4, (64, 64, 1)).round().astype(np.int8).astype(np.uint8)
    assert patch_deviations(shaded).max() < FLAT
    assert patch_deviations(noisy).mean() == pytest.approx(4, rel=0.1)


def test_an_interval_is_the_bootstraps():
    values = np.random.default_rng(0).normal(3, 1, 400)
    figure, low, high = interval(lambda drawn: values[drawn].mean(1), len(values))
    assert figure == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_seeds_are_other_samples_where_there_is_noise_and_tiny_has_none(crops):
    pipeline = DeeDSRPipeline.from_pretrained("tiny")
    pipeline.set_progress_bar_config(disable=True)
    whole = degraded(crops[0], "deedsr")
    pair = Pair(whole.crop, whole.hr[:64, :64], whole.lr[:16, :16])
    recommended, noisy = ([sampled(pipeline, pair, how, seed) for seed in (0, 1)] for how in ({}, {"temperature": 1.0}))
    np.testing.assert_array_equal(*recommended)
    assert (noisy[0] != noisy[1]).any()
    mean = sampled(pipeline, pair, {"temperature": 1.0, "seeds": 2})
    np.testing.assert_allclose(mean, np.mean(noisy, 0), atol=1)
