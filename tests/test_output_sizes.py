"""Claims about results of other sizes than the model's factor gives."""

import cv2
import numpy as np
import pytest
from PIL import Image

from jobs.cli import main
from pipelines.inference.options import UpscaleOptions
from pipelines.inference.upscaling import upscale


@pytest.fixture
def folder(photos, tmp_path):
    """a.png, a shipped photograph reduced to 24 x 16 pixels."""
    (tmp_path / "in").mkdir()
    photo = Image.open(photos / "validation" / "Green-Maple.jpg").resize((24, 16), Image.Resampling.BOX)
    photo.save(tmp_path / "in" / "a.png")
    return tmp_path / "in"


def run(folder, model, **options):
    given = UpscaleOptions(input=[str(folder / "a.png")], out=str(folder.parent / "out"), model=model, **options)
    return upscale(given, progress=False)


def result(folder, model, **options) -> np.ndarray:
    """What becomes of a.png, 24 x 16 pixels."""
    [image] = run(folder, model, **options).images
    assert not image["reused"]
    return np.asarray(Image.open(image["output"])).astype(int)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"factor": 2}, (48, 32)),
        ({"factor": 1}, (24, 16)),
        ({"factor": 2.5}, (60, 40)),
        ({"size": "60x60"}, (60, 40)),
        ({"size": "1000x32"}, (48, 32)),
    ],
)
def test_a_smaller_result_is_the_models_reduced_by_areas(folder, model, options, size):
    full = result(folder, model)
    assert full.shape == (64, 96, 3)
    smaller = result(folder, model, **options)
    assert smaller.shape == (*size[::-1], 3)
    expected = cv2.resize(full.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    assert np.abs(smaller - expected).max() <= 1  # the model's is not rounded between


@pytest.mark.parametrize(("options", "between"), [({"factor": 8}, (48, 32)), ({"size": "12x12"}, (12, 8))])
def test_the_input_is_resized_first_where_the_result_is_larger_than_the_models_or_smaller_than_the_input(
    folder, model, options, between
):
    sized = result(folder, model, **options)
    given = cv2.imread(str(folder / "a.png")).astype(np.float32)
    way = cv2.INTER_CUBIC if between[0] > 24 else cv2.INTER_AREA
    cv2.imwrite(str(folder / "a.png"), cv2.resize(given, between, interpolation=way).clip(0, 255).round())
    expected = result(folder, model)
    if sized.shape != expected.shape:
        expected = cv2.resize(expected.astype(np.float32), sized.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(sized - expected).mean() < 2  # the input is not rounded between


def test_a_result_is_reused_only_for_its_size(folder, model):
    reused = lambda **options: run(folder, model, **options).reused
    assert [reused(), reused(factor=4), reused(factor=2), reused(factor=2), reused(size="48x32"), reused()] == [
        0, 1, 0, 1, 0, 0,
    ]  # fmt: skip


def test_transparency_has_the_size_of_the_result(folder, model):
    rgba = Image.open(folder / "a.png").convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    rgba.save(folder / "a.png")
    assert result(folder, model, factor=2).shape == (32, 48, 4)


def test_what_is_no_size_is_refused(folder, capsys):
    for words, told in (
        (["--factor", "2", "--size", "20x20"], "give one of them"),
        (["--factor", "0.5"], "factor"),
        (["--size", "2048"], "--size must be WIDTHxHEIGHT in pixels, such as 2048x1536, got 2048"),
        (["--size", "0x10"], "got 0x10"),
    ):
        assert main(["upscale", str(folder), "--out", str(folder.parent / "out"), *words]) == 2
        assert told in capsys.readouterr().err
