"""Degradation: draws, kernels, the chain against its plain transcription."""

import json
import math
from collections import Counter, defaultdict

import cv2
import numpy as np
import plain_degradation as plain
import pytest
from scipy import stats

from deedsr.dataset.keys import generator
from deedsr.dataset.recipe import builtin_recipes, load_recipe
from deedsr.degradation import chain, degrade, draw_degradation, kernels, scalar_parameters

DEEDSR = load_recipe("deedsr").degradation
SIGNIFICANCE = 1e-4  # of each statistical test; the draws are fixed, so that a test that passes keeps passing


@pytest.fixture(scope="module")
def crops(photos):
    """256 px crops of the shipped photographs."""
    names = sorted((photos / "train").glob("*.jpg"))
    images = [cv2.cvtColor(cv2.imread(str(name)), cv2.COLOR_BGR2RGB) for name in names]
    return [np.ascontiguousarray(image[300:556, 400:656]) for image in images]


@pytest.fixture(scope="module")
def many_draws():
    return [draw_degradation(DEEDSR, (512, 512), 4, generator("draws", index)) for index in range(5000)]


def values(draws, step, key):
    found = [item[key] for draw in draws for item in draw["steps"] if item["step"] == step and key in item]
    assert len(found) > 100
    return np.array(found)


def assert_uniform(sample, low, high):
    assert low <= sample.min()
    assert sample.max() <= high
    assert stats.kstest(sample, stats.uniform(low, high - low).cdf).pvalue > SIGNIFICANCE


def levels(pixels):
    """The chain's pixels as 8-bit levels, unrounded."""
    return pixels / 64 + np.float32(128)


def pixels(levels):
    return (levels - np.float32(128)) * 64


def assert_rounded(errors, limit=0.01):
    """Root mean square of what rounding once or twice to a 64th of a level, and the weights, leaves."""
    flat = np.concatenate([error.ravel() for error in errors])
    assert np.sqrt(np.mean(flat**2)) < limit
    assert np.abs(flat).max() < 20 * limit
    assert abs(flat.mean()) < 0.1 * limit


def assert_share(hits, count, share):
    assert stats.binomtest(int(hits), count, share).pvalue > SIGNIFICANCE


# Draws


def test_equal_seeds_give_equal_draws_and_other_samples_other_draws():
    def draw(*parts):
        return draw_degradation(DEEDSR, (512, 512), 4, generator(*parts))

    assert draw("a", 1) == draw("a", 1)
    dirty = [json.dumps(drawn) for variant in range(200) if not (drawn := draw("a", variant))["clean"]]
    assert len(set(dirty)) == len(dirty) > 180


def test_draws_depend_on_no_global_random_state():
    np.random.seed(1)
    first = draw_degradation(DEEDSR, (512, 512), 4, generator("a"))
    np.random.seed(2)
    cv2.setRNGSeed(5)
    assert draw_degradation(DEEDSR, (512, 512), 4, generator("a")) == first


def test_continuous_values_are_uniform_over_their_ranges(many_draws):
    assert_uniform(values(many_draws, "blur1", "sigma_x"), 0.2, 1.5)
    assert_uniform(values(many_draws, "blur2", "sigma_x"), 0.2, 1.0)
    assert_uniform(values(many_draws, "noise1", "sigma"), 1, 15)
    assert_uniform(values(many_draws, "noise1", "scale"), 0.05, 2.0)
    assert_uniform(values(many_draws, "noise2", "sigma"), 1, 12)
    assert_uniform(values(many_draws, "noise2", "scale"), 0.05, 1.0)
    assert_uniform(values(many_draws, "sinc", "cutoff"), math.pi / 3, math.pi)
    factor = values(many_draws, "resize1", "factor")
    assert_uniform(factor[factor < 1], 0.3, 1)
    assert_uniform(factor[factor > 1], 1, 1.5)
    factor = values(many_draws, "resize2", "factor")
    assert_uniform(factor[factor < 1], 0.6, 1)
    assert_uniform(factor[factor > 1], 1, 1.2)
    turned = [item for draw in many_draws for item in draw["steps"] if "anisotropic" in item.get("kernel", "")]
    assert_uniform(np.array([item["theta"] for item in turned]), -math.pi, math.pi)
    assert_uniform(np.array([item["sigma_y"] for item in turned if item["step"] == "blur1"]), 0.2, 1.5)
    sinc = [item for draw in many_draws for item in draw["steps"] if item["step"] == "blur1" and "cutoff" in item]
    assert_uniform(np.array([item["cutoff"] for item in sinc if item["size"] < 13]), math.pi / 3, math.pi)
    assert_uniform(np.array([item["cutoff"] for item in sinc if item["size"] >= 13]), math.pi / 5, math.pi)
    assert min(item["cutoff"] for item in sinc if item["size"] == 13) < math.pi / 3


def test_integers_cover_their_ranges_evenly(many_draws):
    for step, low, high in (("jpeg1", 60, 95), ("jpeg2", 60, 100)):
        counts = Counter(values(many_draws, step, "quality").tolist())
        assert set(counts) == set(range(low, high + 1))
        assert stats.chisquare(list(counts.values())).pvalue > SIGNIFICANCE
    for step in ("blur1", "blur2", "sinc"):
        counts = Counter(values(many_draws, step, "size").tolist())
        assert set(counts) == {7, 9, 11, 13, 15, 17, 19, 21}
        assert stats.chisquare(list(counts.values())).pvalue > SIGNIFICANCE


def test_choices_have_their_shares_sample_by_sample(many_draws):
    count = len(many_draws)
    assert_share(sum(draw["clean"] for draw in many_draws), count, 0.01)
    dirty = [draw for draw in many_draws if not draw["clean"]]
    steps = [{item["step"]: item for item in draw["steps"]} for draw in dirty]
    count = len(dirty)
    assert all("blur1" in step for step in steps)
    assert_share(sum("blur2" in step for step in steps), count, 0.5)
    assert_share(sum("sinc" in step for step in steps), count, 0.8)
    assert_share(sum(draw["steps"][-1]["step"] == "jpeg2" for draw in dirty), count, 0.5)
    for name in ("noise1", "noise2"):
        assert_share(sum(step[name]["family"] == "gaussian" for step in steps), count, 0.5)
        assert_share(sum(step[name]["gray"] for step in steps), count, 0.4)
    for name, up, down in (("resize1", 0.2, 0.7), ("resize2", 0.3, 0.4)):
        assert_share(sum(step[name]["factor"] > 1 for step in steps), count, up)
        assert_share(sum(step[name]["factor"] < 1 for step in steps), count, down)
    for name in ("resize1", "resize2", "resize3"):
        for mode in ("area", "bilinear", "bicubic"):
            assert_share(sum(step[name]["mode"] == mode for step in steps), count, 1 / 3)
    mix = {"sinc": 0.1} | {name: 0.9 * share for name, share in DEEDSR.blur1.mix}
    for name, share in mix.items():
        assert_share(sum(step["blur1"]["kernel"] == name for step in steps), count, share)


def test_shape_exponents_lie_below_one_and_above_one_half_of_the_time_each():
    ranges = load_recipe("realesrgan").degradation
    draws = [draw_degradation(ranges, (64, 64), 4, generator("beta", index)) for index in range(3000)]
    for prefix, low, high in (("generalized", 0.5, 4), ("plateau", 1, 2)):
        found = [item for draw in draws for item in draw["steps"] if item.get("kernel", "").startswith(prefix)]
        beta = np.array([item["beta"] for item in found])
        if low < 1:
            assert_uniform(beta[beta < 1], low, 1)
        assert_uniform(beta[beta > 1], 1, high)
        assert_share(np.sum(beta > 1), len(beta), 0.5)


def test_order_of_the_last_step_is_the_one_drawn(many_draws):
    for draw in many_draws[:500]:
        tail = [item["step"] for item in draw["steps"] if item["step"] in ("noise2", "resize3", "sinc", "jpeg2")]
        if not draw["clean"]:
            assert tail in (
                ["noise2", "resize3", "sinc", "jpeg2"],
                ["noise2", "resize3", "jpeg2"],
                ["noise2", "jpeg2", "resize3", "sinc"],
                ["noise2", "jpeg2", "resize3"],
            )


def test_scalar_parameters_have_the_same_columns_for_every_sample(many_draws):
    rows = [scalar_parameters(draw) for draw in many_draws[:500]]
    assert any(row["deg_clean"] for row in rows)
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert all(name.startswith("deg_") and isinstance(value, float) for row in rows for name, value in row.items())
    for draw, row in zip(many_draws, rows, strict=False):
        for item in draw["steps"]:
            for key in ("sigma_x", "factor", "quality", "cutoff", "scale"):
                if key in item:
                    assert row[f"deg_{item['step']}_{key}"] == item[key]
    dirty = next(row for row in rows if not row["deg_clean"])
    assert math.isnan(dirty["deg_noise1_sigma"]) != math.isnan(dirty["deg_noise1_scale"])


# Kernels


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_kernels_equal_their_definition(kernel):
    draws = np.random.default_rng(len(kernel))
    for size in (7, 13, 21):
        parameters = {"cutoff": draws.uniform(0.7, 3.1)}
        if kernel != "sinc":
            sigma_x, sigma_y = draws.uniform(0.2, 3, 2)
            turned = kernel.endswith("anisotropic")
            parameters = {"sigma_x": sigma_x, "sigma_y": sigma_y if turned else sigma_x, "theta": draws.uniform(-3, 3)}
            if kernel.startswith(("generalized", "plateau")):
                parameters["beta"] = draws.uniform(0.5, 4)
        built = kernels.blur_kernel(kernel, size, **parameters)
        assert built.shape == (size, size)
        assert built.sum() == pytest.approx(1, abs=1e-5)
        assert np.allclose(built, built[::-1, ::-1], atol=1e-7)  # symmetric about its centre
        if not kernel.endswith("anisotropic"):
            assert np.allclose(built, built.T, atol=1e-7)
        pad = (21 - size) // 2
        assert np.allclose(np.pad(built, pad), plain.kernel_21(kernel, size, **parameters), atol=2e-7)


def test_an_unknown_kernel_and_an_even_size_are_refused():
    with pytest.raises(ValueError, match="isotropic, anisotropic"):
        kernels.blur_kernel("box", 7)
    with pytest.raises(ValueError, match="odd and positive, got 8"):
        kernels.sinc(8, 1.0)


def test_cutting_separating_and_rounding_a_kernel_moves_no_pixel_visibly(crops, many_draws):
    errors = []
    for draw in many_draws[:100]:
        for item in draw["steps"]:
            if item["step"] == "blur1":
                parameters = {key: value for key, value in item.items() if key != "step"}
                kernel = plain.kernel_21(**parameters).astype(np.float32)
                full = cv2.filter2D(crops[0].astype(np.float32), -1, kernel)
                errors.append(levels(chain.blur(crops[0], **parameters)) - full)
    assert_rounded(errors)


# Resizing


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_resizing_is_torchs(crops, mode):
    image = np.ascontiguousarray(crops[1][:120, :201])
    errors = []
    for factor in (0.3, 0.437, 0.5, 0.77, 1.13, 1.499):
        expected = plain.interpolate(image.astype(np.float32), mode, scale_factor=factor)
        result = chain.rescale(image, mode, factor)
        assert result.shape == expected.shape
        errors.append(levels(result) - expected)
    for size in ((30, 50), (31, 64), (60, 67), (144, 240), (120, 201)):
        expected = plain.interpolate(image.astype(np.float32), mode, size=size)
        errors.append(levels(chain.resize(image, mode, list(size))) - expected)
    assert_rounded(errors)
    assert chain.rescale(image, mode, 1.0) is image


# The chain


def test_a_round_trip_through_json_replays_the_identical_lr(crops):
    for index in range(72):
        name = builtin_recipes()[index % len(builtin_recipes())]
        hr = crops[index % len(crops)]
        draws = draw_degradation(load_recipe(name).degradation, (256, 256), 4, generator(name, index))
        before = json.dumps(draws, sort_keys=True)
        lr = degrade(hr, draws)
        assert lr.shape == (64, 64, 3)
        assert lr.dtype == np.uint8
        cv2.setRNGSeed(index)
        assert np.array_equal(degrade(hr.copy(), json.loads(before)), lr)
        assert json.dumps(draws, sort_keys=True) == before


def test_every_step_but_noise_equals_its_plain_transcription(crops):
    """Step by step from the same image: a rounding that falls the other way would spread over a block in JPEG."""
    errors = defaultdict(list)
    for index in range(40):
        image = crops[index % len(crops)].astype(np.float32)
        for item in draw_degradation(DEEDSR, (256, 256), 4, generator("plain", index))["steps"]:
            image = np.rint(image * 64) / 64  # the chain's grid
            expected = plain.apply(image, **item)
            if not item["step"].startswith("noise"):
                parameters = {key: value for key, value in item.items() if key != "step"}
                bgr = pixels(np.ascontiguousarray(image[..., ::-1]))
                result = chain._STEPS[item["step"]](bgr, **parameters)[..., ::-1]
                assert result.shape == expected.shape
                errors[item["step"]].append((result if result.dtype == np.uint8 else levels(result)) - expected)
            image = expected
    assert len(errors) == 8
    for step, found in errors.items():
        assert_rounded(found, 0.05 if step == "sinc" else 0.015)


def test_the_chain_but_for_noise_and_jpeg_is_its_plain_transcription_up_to_rounding(crops):
    """JPEG would make much of a pixel that is rounded the other way."""
    errors = []
    for index in range(30):
        hr = crops[index % len(crops)]
        draws = draw_degradation(DEEDSR, (256, 256), 4, generator("plain", index))
        draws["steps"] = [item for item in draws["steps"] if not item["step"].startswith(("noise", "jpeg"))]
        errors.append(degrade(hr, draws).astype(int) - plain.degrade(hr, draws))
    assert np.abs(errors).max() == 1
    assert np.mean(np.abs(errors)) < 0.03
    assert abs(np.mean(errors)) < 0.001


def test_with_noise_the_chain_has_the_spectrum_of_its_plain_transcription(crops):
    """Mean power of the LR, by frequency band and colour channel, over the same draws."""

    def bands(lr):
        power = np.abs(np.fft.fft2(lr.astype(float) - lr.mean((0, 1)), axes=(0, 1))) ** 2
        frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None])
        edges = np.linspace(0, 0.5, 7)
        return [
            power[(frequency > low) & (frequency <= high)].mean(0)
            for low, high in zip(edges[:-1], edges[1:], strict=True)
        ]

    ours, exact = [], []
    for index in range(90):
        hr = crops[index % len(crops)]
        draws = draw_degradation(DEEDSR, (256, 256), 4, generator("spectrum", index))
        ours.append(bands(degrade(hr, draws)))
        exact.append(bands(plain.degrade(hr, draws)))
    assert np.allclose(np.mean(ours, 0), np.mean(exact, 0), rtol=0.02)


def test_a_clean_sample_is_the_bicubic_reduction(crops):
    ranges = DEEDSR.model_copy(update={"clean_probability": 1.0})
    draws = draw_degradation(ranges, (256, 256), 4, generator("clean"))
    expected = plain.interpolate(crops[3].astype(np.float32), "bicubic", scale_factor=0.25)
    assert np.abs(degrade(crops[3], draws) - expected.clip(0, 255)).max() < 0.52


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_any_size_from_16_pixels_on_works(scale):
    rng = np.random.default_rng(scale)
    ranges = load_recipe("heavy").degradation
    for index, size in enumerate([(16, 16), (16, 301), (97, 17), (33, 50), (128, 61)] * 8):
        hr = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        lr = degrade(hr, draw_degradation(ranges, size, scale, generator(index)))
        assert lr.shape == (size[0] // scale, size[1] // scale, 3)


def test_images_of_one_colour_keep_it_but_for_noise():
    for level in (0, 255):
        hr = np.full((64, 64, 3), level, np.uint8)
        draws = draw_degradation(DEEDSR, (64, 64), 4, generator("flat"))
        draws["steps"] = [item for item in draws["steps"] if not item["step"].startswith("noise")]
        assert np.abs(degrade(hr, draws).astype(int) - level).max() <= 1


def test_other_images_than_the_draws_are_for_are_refused():
    draws = draw_degradation(DEEDSR, (64, 64), 4, generator("a"))
    with pytest.raises(ValueError, match=r"size \[64, 64\], got \[64, 60\]"):
        degrade(np.zeros((64, 60, 3), np.uint8), draws)
    with pytest.raises(ValueError, match=r"uint8 of shape \(height, width, 3\), got float32"):
        degrade(np.zeros((64, 64, 3), np.float32), draws)
    with pytest.raises(ValueError, match="at least 16 px a side, got 15x64"):
        draw_degradation(DEEDSR, (15, 64), 4, generator("a"))


def test_heavier_recipes_leave_less_of_the_picture(crops):
    def error(name):
        ranges = load_recipe(name).degradation
        total = 0.0
        for index in range(40):
            hr = crops[index % len(crops)]
            lr = degrade(hr, draw_degradation(ranges, (256, 256), 4, generator(name, index)))
            total += np.abs(cv2.resize(hr, (64, 64), interpolation=cv2.INTER_AREA).astype(float) - lr).mean()
        return total

    assert error("light") < 0.7 * error("medium") < 0.7 * 0.8 * error("heavy")
