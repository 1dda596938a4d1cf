"""Claims about upscaling: files from anywhere to anywhere, by a small model with random weights."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import make_pipeline

from deedsr.errors import UsageError
from pipelines.storage import open_storage, publish
from pipelines.upscaling import decode, upscale


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "small"
    make_pipeline(num_inference_steps=2).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def picture(photos) -> Image.Image:
    """A shipped photograph reduced to 24 x 16 pixels."""
    return Image.open(photos / "validation" / "Green-Maple.jpg").resize((24, 16), Image.Resampling.BOX)


@pytest.fixture
def folder(picture, tmp_path) -> Path:
    """in/a.png, in/deep/er/b.jpg, and files that are no pictures."""
    (tmp_path / "in" / "deep" / "er").mkdir(parents=True)
    picture.save(tmp_path / "in" / "a.png")
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in" / "deep" / "er" / "b.jpg")
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    return tmp_path / "in"


def run(inputs, out, model, **options):
    return upscale([str(given) for given in inputs], str(out), model=model, progress=False, **options)


def written(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def test_a_folder_is_searched_through_and_its_subfolders_are_kept(folder, model, tmp_path):
    result = run([folder], tmp_path / "out", model)
    assert written(tmp_path / "out") == ["a.png", "deep/er/b.png"]
    assert not result.failed
    assert [sorted(image) for image in result.images] == [["input", "output", "seconds"]] * 2
    assert [image["output"] for image in result.images] == [
        str(tmp_path / "out" / "a.png"),
        str(tmp_path / "out" / "deep" / "er" / "b.png"),
    ]
    assert Image.open(tmp_path / "out" / "a.png").size == (96, 64)
    assert Image.open(tmp_path / "out" / "deep" / "er" / "b.png").size == (64, 96)


def test_a_picture_comes_out_the_same_alone_in_a_folder_and_again(folder, model, tmp_path):
    run([folder], tmp_path / "all", model, seed=5)
    run([folder / "deep" / "er" / "b.jpg"], tmp_path / "alone", model, seed=5)
    run([folder / "deep" / "er" / "b.jpg"], tmp_path / "other", model, seed=6)
    run([f"{folder}/**/*.jpg"], tmp_path / "alone", model, seed=5)  # replaces
    alone = (tmp_path / "alone" / "b.png").read_bytes()
    assert alone == (tmp_path / "all" / "deep" / "er" / "b.png").read_bytes()
    assert alone != (tmp_path / "other" / "b.png").read_bytes()


def test_a_bad_file_is_reported_and_the_rest_goes_on(folder, model, tmp_path):
    (folder / "0-broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "1-empty.jpg").write_bytes(b"")
    result = run([folder], tmp_path / "out", model)
    assert written(tmp_path / "out") == ["a.png", "deep/er/b.png"]
    assert [Path(failure["input"]).name for failure in result.failed] == ["0-broken.png", "1-empty.jpg"]
    assert "damaged" in result.failed[0]["reason"]
    assert "not a picture of a known format" in result.failed[1]["reason"]
    assert len(result.images) == 2


def test_results_of_an_earlier_command_are_not_its_inputs(folder, model, tmp_path):
    for _ in range(2):
        result = run([folder], folder / "out", model)
        assert len(result.images) == 2
    assert written(folder / "out") == ["a.png", "deep/er/b.png"]


def test_no_result_replaces_an_input_or_another_result(folder, model, picture):
    before = (folder / "a.png").read_bytes()
    picture.save(folder / "a.jpg")
    result = run([folder / "a.png", folder / "deep" / "er" / "b.jpg"], folder, model)
    assert (folder / "a.png").read_bytes() == before
    assert "its result would replace it" in result.failed[0]["reason"]
    assert (folder / "b.png").exists()

    result = run([folder / "a.jpg", folder / "a.png"], folder / "out", model)
    assert [Path(image["input"]).name for image in result.images] == ["a.jpg"]
    assert "would replace that of" in result.failed[0]["reason"]


def test_inputs_and_outputs_may_lie_in_s3(folder, model, bucket, tmp_path):
    place = f"{bucket}/{tmp_path.name}"
    publish(folder, f"{place}/in")
    result = run([f"{place}/in"], f"{place}/out", model)
    assert [image["output"] for image in result.images] == [f"{place}/out/a.png", f"{place}/out/deep/er/b.png"]
    run([folder], tmp_path / "out", model)
    assert open_storage(f"{place}/out").read("a.png") == (tmp_path / "out" / "a.png").read_bytes()
    one = run([f"{place}/in/deep/er/b.jpg"], tmp_path / "one", model)
    assert written(tmp_path / "one") == ["b.png"]
    assert one.images[0]["input"] == f"{place}/in/deep/er/b.jpg"


def test_orientation_is_applied(picture, model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    run([tmp_path / "turned.png", tmp_path / "upright.png"], tmp_path / "out", model)
    turned, upright = (Image.open(tmp_path / "out" / name) for name in ("turned.png", "upright.png"))
    assert turned.size == (64, 96)
    np.testing.assert_array_equal(np.array(turned), np.array(upright))


def test_transparency_is_enlarged_and_kept(picture, model, tmp_path):
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 24).astype(np.uint8), (16, 1)))
    transparent = picture.copy()
    transparent.putalpha(alpha)
    transparent.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png")
    run([tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out", model)
    enlarged = Image.open(tmp_path / "out" / "a.png")
    assert enlarged.mode == "RGBA"
    np.testing.assert_array_equal(enlarged.getchannel("A"), alpha.resize((96, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(enlarged.convert("RGB"), Image.open(tmp_path / "out" / "b.png"))


def test_grey_stays_grey_and_sixteen_bits_become_eight(picture, model, tmp_path):
    grey = np.array(picture.convert("L"))
    cv2.imwrite(str(tmp_path / "eight.png"), grey)
    cv2.imwrite(str(tmp_path / "sixteen.png"), grey.astype(np.uint16) * 257)
    run([tmp_path / "eight.png", tmp_path / "sixteen.png"], tmp_path / "out", model)
    eight, sixteen = (np.array(Image.open(tmp_path / "out" / name)) for name in ("eight.png", "sixteen.png"))
    assert eight.shape == (64, 96, 3)
    assert (eight == eight[..., :1]).all()
    np.testing.assert_array_equal(eight, sixteen)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_every_common_pixel_format_is_read(picture, mode, tmp_path):
    if mode.startswith("I"):
        given = Image.fromarray(np.array(picture.convert("L")).astype(np.uint16 if ";" in mode else np.int32) * 257)
    else:
        given = picture.convert(mode)
    given.save(tmp_path / "x.tif")
    decoded = decode((tmp_path / "x.tif").read_bytes())
    assert decoded.rgb.shape == (16, 24, 3)
    assert (decoded.alpha is not None) == (mode in ("LA", "RGBA"))
    assert decoded.grey == (mode in ("1", "L", "LA", "I;16", "I"))


def test_a_colour_profile_is_kept(picture, model, tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.save(tmp_path / "p.png", icc_profile=profile)
    run([tmp_path / "p.png"], tmp_path / "out", model)
    assert Image.open(tmp_path / "out" / "p.png").info["icc_profile"] == profile


def test_what_cannot_begin_is_refused_before_any_work(folder, model, tmp_path):
    (tmp_path / "bare").mkdir()
    for message, inputs, options in (
        ("missing.png does not exist", [folder, tmp_path / "missing.png"], {}),
        ("has no picture to upscale", [tmp_path / "bare"], {}),
        ("has no picture to upscale", [f"{tmp_path}/*.bmp"], {}),
        ("color_fix must be one of", [folder], {"color_fix": "sepia"}),
        ("no model folder", [folder], {"model": str(tmp_path / "nowhere")}),
    ):
        with pytest.raises(UsageError, match=message):
            run(inputs, tmp_path / "out", **{"model": model} | options)
    assert not (tmp_path / "out").exists()


def test_an_unwritable_output_is_reported(folder, model, tmp_path):
    shutil.copy(folder / "a.png", tmp_path / "file")
    result = run([folder / "a.png"], tmp_path / "file", model)
    assert "not a directory" in result.failed[0]["reason"]
