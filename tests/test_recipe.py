"""Recipes: built-in ones, files that override them, errors, digests; keys of samples."""

import json
from fnmatch import fnmatch

import numpy as np
import pytest
from pydantic import BaseModel

from deedsr.dataset import recipe
from deedsr.dataset.crops import choose_crops, cut
from deedsr.dataset.keys import content_key, generator, sample_key
from deedsr.dataset.recipe import Recipe, builtin_recipes, load_recipe
from deedsr.errors import UsageError


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_recipe_survives_json(name):
    loaded = load_recipe(name)
    assert loaded.name == name
    assert Recipe.model_validate(json.loads(json.dumps(loaded.model_dump(mode="json")))) == loaded


def test_demo_differs_from_deedsr_in_no_range_and_names_the_validation_photographs(photos):
    demo = load_recipe("demo")
    assert demo.degradation == load_recipe("deedsr").degradation
    assert (demo.crop.size, demo.variants) == (256, 4)
    matched = {
        folder: [any(fnmatch(path.name, pattern) for pattern in demo.split.validation_patterns) for path in paths]
        for folder in ("train", "validation")
        if (paths := sorted((photos / folder).glob("*.jpg")))
    }
    assert all(matched["validation"])
    assert not any(matched["train"])


def test_the_pairs_of_div2k_are_thirty_a_photograph_in_the_ranges_that_stablesr_publishes():
    made = load_recipe("div2k_val")
    assert (made.scale, made.variants, made.seed, made.flip, made.rotate, made.split.validation_patterns) == (
        4, 1, 0, 0, 0, ("*",),
    )  # fmt: skip
    # configs/stableSRdata/test_data.yaml of IceClear/StableSR, and the sizes of kernels in its realesrgan_dataset.py.
    draws = made.degradation
    mix = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    for blur, sigma, probability in ((draws.blur1, (0.2, 1.5), 1), (draws.blur2, (0.2, 1.0), 0.5)):
        assert (*dict(blur.mix).values(),) == mix
        assert (*map(tuple, (blur.kernel_size, blur.sigma, blur.beta_generalized, blur.beta_plateau)),) == (
            (7, 21), sigma, (0.5, 2.0), (1, 1.5),
        )  # fmt: skip
        assert (blur.probability, blur.sinc_probability) == (probability, 0.1)
    for resize, shares, factor in (
        (draws.resize1, (0.2, 0.7, 0.1), (0.3, 1.5)),
        (draws.resize2, (0.3, 0.4, 0.3), (0.6, 1.2)),
    ):
        assert ((*dict(resize.shares).values(),), tuple(resize.factor)) == (shares, factor)
    for noise, sigma, scale in ((draws.noise1, (1, 15), (0.05, 2.0)), (draws.noise2, (1, 12), (0.05, 1.0))):
        assert (tuple(noise.gaussian_sigma), tuple(noise.poisson_scale)) == (sigma, scale)
        assert (noise.gaussian_probability, noise.gray_probability) == (0.5, 0.4)
    assert (tuple(draws.jpeg1_quality), tuple(draws.final.jpeg_quality)) == ((60, 95), (60, 100))
    assert (draws.final.sinc_probability, draws.clean_probability) == (0.8, 0)
    # The usual, the lowest and the smallest possible photograph; DIV2K's are 2,040 pixels wide or high.
    for height, width in ((1404, 2040), (2040, 1356), (648, 2040), (512, 1020)):
        photograph = np.zeros((height, width, 3), np.uint8)
        chosen = [choose_crops(photograph, made.crop, generator("a", 0))[0] for _ in range(2)]
        assert len({*chosen[0]}) == 30
        assert all(cut(photograph, place).shape == (512, 512, 3) for place in chosen[0])
        assert chosen[0] == chosen[1]


def leaves(model, path=()):
    for name, value in model:
        if isinstance(value, BaseModel):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def replaced(model, path, value):
    inner = replaced(getattr(model, path[0]), path[1:], value) if path[1:] else value
    return model.model_copy(update={path[0]: inner})


def changed(path, value):
    if path == ("weights",):
        return (recipe.Weight(pattern="faces/*", variants=2),)
    if path == ("strata",):
        return {"one": recipe.Stratum(share=1, degradation=load_recipe("light").degradation)}
    if isinstance(value, tuple):
        return (*value[1:], "area") if not value or isinstance(value[0], str) else (value[0] - 1, value[1])
    if isinstance(value, str):
        return "png" if value == "webp" else "webp"
    return value * 2 + 1


def test_every_field_of_a_recipe_and_the_algorithm_change_its_digest(monkeypatch):
    loaded = load_recipe("deedsr")
    digests = {loaded.digest}
    fields = list(leaves(loaded))
    for path, value in fields:
        digests.add(replaced(loaded, path, changed(path, value)).digest)
    assert len(digests) == len(fields) + 1 > 60
    monkeypatch.setattr(recipe, "ALGORITHM_VERSION", recipe.ALGORITHM_VERSION + 1)
    assert loaded.digest not in digests


def test_a_file_overrides_its_base_key_by_key(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: realesrgan\nseed: 7\ndegradation: {noise1: {gaussian_sigma: [2, 3]}}\n")
    (tmp_path / "child.yaml").write_text("base: mine.yaml\ncrop: {size: 256}\n")
    mine, child = load_recipe(tmp_path / "mine.yaml"), load_recipe(str(tmp_path / "child.yaml"))
    assert mine.name == "mine"
    assert mine.seed == child.seed == 7
    assert mine.degradation.noise1.gaussian_sigma == (2, 3)
    assert mine.degradation.noise1.poisson_scale == (0.05, 3.0)
    assert mine.degradation.blur2.probability == 0.8
    assert (mine.crop.size, child.crop.size) == (512, 256)
    assert child.degradation == mine.degradation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scale: 5", r"scale: input should be 2, 3 or 4, got 5"),
        (
            "crop: {sise: 256}",
            r"unknown key crop\.sise; did you mean size\? accepted here: size, place, per_source, min_std",
        ),
        ("degradation: {blur1: {sigma: [3, 1]}}", r"degradation\.blur1\.sigma must be a range .* got \[3\.0, 1\.0\]"),
        ("degradation: {blur1: {sigma: [-1, 1]}}", r"degradation\.blur1\.sigma must be a range .* got \[-1\.0, 1\.0\]"),
        ("degradation: {blur1: {kernel_size: [8, 21]}}", r"kernel_size must be odd kernel sizes .* got \[8, 21\]"),
        (
            "degradation: {noise2: {gray_probability: 1.5}}",
            r"gray_probability must be a probability .* got 1\.5",
        ),
        ("degradation: {blur1: {mix: {isotropic: 0.9}}}", r"degradation\.blur1\.mix must sum to 1, got 1\.45"),
        ("degradation: {resize1: {shares: {up: 0.9}}}", r"resize1\.shares must sum to 1, got 1\.7"),
        ("degradation: {resize1: {factor: [0.01, 1]}}", r"resize1\.factor must be a range .* 0\.1 <= low"),
        ("degradation: {jpeg1_quality: [0, 90]}", r"jpeg1_quality must be a range \[low, high\] with 1 <= low"),
        ("degradation: {resize_modes: []}", r"degradation\.resize_modes: tuple should have at least 1 item"),
        ("degradation: {resize_modes: [lanczos]}", r"'area', 'bilinear' or 'bicubic', got 'lanczos'"),
        ("degradation: {noise1: {gaussian_sigma: [.nan, 3]}}", r"gaussian_sigma\.0: input should be a finite number"),
        ("formats: {lr: jpeg}", r"formats\.lr: input should be 'png' or 'webp', got 'jpeg'"),
        ("shard: {min_sources: 40}", r"shard must have min_sources <= target_sources <= max_sources, got 40, 16, 64"),
        ("crop: {size: 510}", r"crop\.size must be a multiple of scale, got 510 and 4"),
        ("crop: 512", r"crop must be a mapping of size, place, per_source, min_std, min_laplacian, got 512"),
        ("seed: many", r"seed: input should be a valid integer.* got 'many'"),
        ("variants: 0", r"variants: input should be greater than or equal to 1, got 0"),
        ("base: nope", r"no recipe 'nope': it is neither a file nor one of benchmark, deedsr, demo, div2k_val, heavy"),
        ("base: mine.yaml", r"is its own base"),
        ("base: [deedsr]", r"base must be the name or path of a recipe"),
        ("a: [", r"is not valid YAML"),
        ("- deedsr", r"must be a YAML mapping of keys, got list"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line_that_names_the_key_and_what_is_accepted(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "mine.yaml").write_text("base: light\nname: früh\n", encoding)
    assert load_recipe(tmp_path / "mine.yaml").name == "früh"
    (tmp_path / "mine.yaml").write_text("base: light\nname: früh\n", "latin-1")
    with pytest.raises(UsageError, match="is not valid YAML"):
        load_recipe(tmp_path / "mine.yaml")


def test_an_unknown_recipe_is_refused_with_the_names_of_those_there_are(tmp_path):
    with pytest.raises(
        UsageError, match="neither a file nor one of benchmark, deedsr, demo, div2k_val, heavy, light, medium"
    ):
        load_recipe("deepsr")
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path)


# Keys


def test_keys_name_one_crop_and_one_degradation():
    key = content_key(0, "a/b.jpg", 3, 4)
    others = [(1, "a/b.jpg", 3, 4), (0, "a/c.jpg", 3, 4), (0, "a/b.jpg", 34, 4), (0, "a/b.jpg", 3, 44)]
    assert len({key, *(content_key(*other) for other in others)}) == 5
    assert len(key) == 20
    assert int(key, 16) >= 0
    assert sample_key(key, 3) == f"{key}-03"
    assert content_key(np.int64(0), "a/b.jpg", np.int64(3), 4) == key
    assert content_key(0, b"\xff.jpg".decode(errors="surrogateescape"), 3, 4) != key


def test_generators_of_different_parts_are_independent():
    parts = [("a", 1), ("a", 2), ("a1",), ("a", "1"), ("a", 1, 0), (1, "a")]
    assert len({generator(*part).random() for part in parts}) == len(parts)
    assert generator("a", 1).random() == generator("a", 1).random()
    assert generator("a", 1).bit_generator.random_raw() == 5384203339590973226
