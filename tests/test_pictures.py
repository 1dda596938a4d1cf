"""Claims on reading sources: a picture gives its pixels, anything else a reason, and nothing else happens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nasty_pictures import cases
from picture_files import PHOTO, encoded, png, tiff
from PIL import Image
from source_files import run

from deedsr.dataset.pictures import RejectedImage, decode
from deedsr.dataset.recipe import Recipe
from pipelines.data.dataset import Dataset
from pipelines.shards.listing import list_sources

CASES = cases()
REASONS = {
    "empty file",
    "not a JPEG, PNG, WebP or TIFF image",
    "content does not match the file's extension",
    "too many pixels",
    "decompression bomb",
    "unsupported pixel format",
    "unsupported colour space",
    "truncated or broken image",
    "has transparency",
}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_file_gives_its_pixels_or_its_reason(case):
    if isinstance(case.expected, str):
        assert case.expected in REASONS
        with pytest.raises(RejectedImage) as rejection:
            decode(case.data, case.name)
        assert str(rejection.value) == case.expected
        return
    pixels = decode(case.data, case.name)
    assert pixels.dtype == np.uint8
    assert pixels.shape == case.expected.shape
    assert pixels.flags.c_contiguous
    assert np.abs(pixels - case.expected.astype(float)).mean() <= case.tolerance


def test_only_what_is_not_wholly_opaque_is_rejected_for_its_alpha():
    for case in CASES:
        if isinstance(case.expected, str):
            continue
        if ("alpha" in case.name and "opaque" not in case.name) or "hole" in case.name:
            with pytest.raises(RejectedImage, match="has transparency"):
                decode(case.data, case.name, alpha="reject")
        else:
            assert np.array_equal(decode(case.data, case.name, alpha="reject"), decode(case.data, case.name))


def test_the_extension_is_only_held_against_a_file_if_it_names_another_of_the_four_formats():
    data = png(PHOTO)
    for name in ("", "photo", "photo.PNG", "photo.heic", "photo.png.orig", "holiday.jpg/photo"):
        assert np.array_equal(decode(data, name), PHOTO)
    for name in ("photo.jpg", "photo.JFIF", "photo.png.webp", "a/photo.tif"):
        with pytest.raises(RejectedImage, match="content does not match"):
            decode(data, name)


def test_adobe_rgb_of_a_camera_is_that_of_a_profile():
    shown = {case.name: decode(case.data).astype(int) for case in CASES if "exif says" in case.name}
    profile, plain = (decode(next(c.data for c in CASES if c.name == f"{n}.jpg")) for n in ("adobe rgb", "baseline"))
    for name in ("adobe rgb", "R03", "srgb, profile adobe rgb"):
        assert np.abs(shown[f"exif says {name}.jpg"] - profile).max() <= 1
    for name in ("srgb", "nothing"):
        assert np.array_equal(shown[f"exif says {name}.jpg"], plain)


def test_a_program_that_lifts_pillows_limit_does_not_lift_ours(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    huge = [case for case in CASES if case.name.startswith("huge")]
    assert len(huge) == 4
    for case in huge:
        with pytest.raises(RejectedImage, match="too many pixels"):
            decode(case.data)


@pytest.mark.parametrize(
    "data",
    [
        encoded(PHOTO[:40, :56], "JPEG", quality=90),
        encoded(PHOTO[:40, :56], "JPEG", quality=90, progressive=True),
        encoded(Image.fromarray(PHOTO[:40, :56]).convert("CMYK"), "JPEG", quality=90),
        encoded(PHOTO[:40, :56], "PNG"),
        png(PHOTO[:40, :56].astype(np.uint16) * 257),
        encoded(Image.fromarray(PHOTO[:40, :56]).quantize(16), "PNG", transparency=3),
        encoded(PHOTO[:40, :56], "WEBP", quality=80),
        encoded(PHOTO[:40, :56], "WEBP", lossless=True),
        encoded(PHOTO[:40, :56], "TIFF"),
        tiff(PHOTO[:40, :56].astype(np.uint16) * 257, 2),
        encoded(Image.fromarray(PHOTO[:40, :56]), "TIFF", compression="tiff_lzw"),
        encoded(Image.fromarray(PHOTO[:40, :56]), "TIFF", compression="jpeg"),
    ],
    ids=[
        "jpeg",
        "progressive",
        "cmyk",
        "png",
        "deep png",
        "palette",
        "webp",
        "webp ll",
        "tiff",
        "deep tiff",
        "lzw",
        "jif",
    ],
)
def test_whatever_is_cut_or_flipped_only_pixels_or_a_known_reason_come_out(data):
    rng = np.random.default_rng(0)
    damaged = [data[: rng.integers(len(data))] for _ in range(60)]
    for number in range(240):
        flipped = bytearray(data)
        reach = len(data) if number % 2 else min(len(data), 200)  # every other one within the headers
        for place in rng.integers(reach, size=1 + number % 3):
            flipped[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    reasons = set()
    for bad in damaged:
        try:
            pixels = decode(bad)
        except RejectedImage as reason:
            reasons.add(str(reason))
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
    assert "truncated or broken image" in reasons
    assert reasons <= REASONS


PROBE = """
import hashlib, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from nasty_pictures import cases
from deedsr.dataset.crops import choose_crops
from deedsr.dataset.pictures import RejectedImage, decode
from deedsr.dataset.recipe import Crop
digest = hashlib.sha256()
photos = [path.read_bytes() for path in sorted(Path(sys.argv[2]).glob("*.jpg"))]
for data in [case.data for case in cases() if not isinstance(case.expected, str)] + photos:
    image = decode(data)
    digest.update(image)
    try:
        crop = Crop(size=64, per_source=10000, min_std=15, min_laplacian=400)
        digest.update(repr(choose_crops(image, crop, np.random.default_rng(0))).encode())
    except RejectedImage:
        pass
print(digest.hexdigest())
"""


def test_pixels_and_crops_do_not_depend_on_the_processor(photos):
    def digest(**variables: str) -> str:
        command = [sys.executable, "-c", PROBE, str(Path(__file__).parent), str(photos / "validation")]
        environment = os.environ | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    plain = digest(
        JSIMD_FORCENONE="1",
        OPENCV_IPP="disabled",
        OPENCV_CPU_DISABLE="AVX2,FMA3,AVX,SSE4.2,SSE4.1",
        NPY_DISABLE_CPU_FEATURES="X86_V3",
        GLIBC_TUNABLES="glibc.cpu.hwcaps=-AVX2,-AVX,-FMA",
    )
    assert plain == digest()


def test_given_is_used_and_rejected_whatever_the_folder_holds(photos, small_recipe, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("Wine.jpg", "life.jpg", "Snow-Trees.jpg"):
        (folder / name).write_bytes((photos / "train" / name).read_bytes())
    for case in CASES:
        (folder / case.name).write_bytes(case.data)
    fields = small_recipe.model_dump(mode="json") | {"variants": 1, "max_rejected_share": 0.9}
    fields["shard"] = {"min_sources": 20, "target_sources": 40, "max_sources": 80}
    run([folder], tmp_path / "out", Recipe.model_validate(fields))

    given = {source.path for source in list_sources([str(folder)])}
    expected = {case.name: case.expected for case in CASES if isinstance(case.expected, str)}
    expected |= {"too small.png": "smaller than the crop", "too flat.png": "no crop has enough texture"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    rejected = [(line["source"], line["reason"]) for line in lines if line["kind"] == "source"]
    assert sorted(rejected) == sorted((name, reason) for name, reason in expected.items() if name in given)
    dataset = Dataset.open(str(tmp_path / "out"))
    assert set(dataset.index()["source"].to_pylist()) == given - expected.keys()
    manifest = dataset.manifest
    assert manifest.given == len(given) == manifest.used + manifest.rejected
