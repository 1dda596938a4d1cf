"""Claims about what becomes of a picture file around its enlargement: pixels, depth, profile, EXIF, formats."""

import io
import struct

import numpy as np
import pytest
from nasty_pictures import ADOBE_RGB, DEEP, GREY, LINEAR_GREY, PHOTO, cases, encoded, exif, iccp, png, tiff
from PIL import ExifTags, Image

from deedsr.dataset.pictures import decode
from deedsr.errors import DeeDSRError
from deedsr.sampling.latents import enlarge
from pipelines.upscaling.encoding import encode, require_fit
from pipelines.upscaling.metadata import exif_of_result, mark_of
from pipelines.upscaling.picture import Picture, read_picture

CASES = {case.name: case for case in cases()}
READ = [case for case in CASES.values() if not isinstance(case.expected, str)]
UNREADABLE = [
    case for case in CASES.values() if isinstance(case.expected, str) and "not a JPEG" not in case.expected
    and "does not match" not in case.expected
]  # fmt: skip
MARK = "0123456789abcdef" * 2
EXIF, GPS, INTEROP = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop


def file_of(picture: Picture, format: str = "png") -> bytes:
    height, width = picture.pixels_HWC.shape[:2]
    return encode(picture, exif_of_result(picture.exif, width, height, MARK), format, 95)


def bicubic(picture: Picture, deep: bool = False) -> Picture:
    import torch

    return picture.enlarged(enlarge(torch.from_numpy(picture.rgb())[None], 4)[0].numpy(), deep)


def unchanged(picture: Picture, format: str) -> Picture:
    """As through a network that returns what it is given."""
    return picture.enlarged(picture.rgb(), deep=picture.deep and format == "png")


def opened(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_result_shows_what_the_original_showed(format):
    lost = {"png": 0.1, "jpeg": 2.5, "webp": 2.5}[format]
    for case in READ:
        picture = read_picture(case.data)
        if case.name == "too small.png" or (format == "jpeg" and not picture.opaque):
            continue
        shown = decode(file_of(unchanged(picture, format), format))
        assert np.abs(shown - case.expected.astype(float)).mean() <= case.tolerance + lost, case.name


def test_a_file_that_cannot_be_read_has_a_reason_and_no_other_error():
    assert len(UNREADABLE) > 30
    for case in UNREADABLE:
        with pytest.raises(DeeDSRError, match="not a picture of a known format|" + case.expected):
            read_picture(case.data)
    with pytest.raises(DeeDSRError, match=r"too many pixels \(the limit is 178 million\): cut it into parts"):
        read_picture(CASES["huge header.png"].data)
    with pytest.raises(DeeDSRError, match="convert it to 8 or 16 bits"):
        read_picture(CASES["floats.tif"].data)


@pytest.mark.parametrize("format", ["GIF", "BMP", "PPM", "JPEG2000", "AVIF"])
def test_other_formats_are_read_as_well(format):
    lossless = {"JPEG2000": {"irreversible": False}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(format, {})
    shown = decode(file_of(read_picture(encoded(PHOTO, format, **lossless))))
    assert np.abs(shown - PHOTO.astype(float)).mean() <= {"GIF": 12, "AVIF": 2}.get(format, 0)


@pytest.mark.parametrize("data", [png(DEEP), tiff(DEEP, 2), png(DEEP[..., :1])], ids=["png", "tiff", "grey"])
def test_sixteen_bits_go_in_and_come_out(data):
    before = read_picture(data)
    after = read_picture(file_of(unchanged(before, "png")))
    assert after.pixels_HWC.dtype == np.uint16
    assert np.abs(after.pixels_HWC.astype(int) - before.pixels_HWC).max() <= 1
    assert len(np.unique(bicubic(before, deep=True).pixels_HWC & 255)) == 256
    if before.grey:
        assert opened(file_of(before)).mode == "I;16"
    assert bicubic(before, deep=False).pixels_HWC.dtype == np.uint8


def test_grey_stays_grey_with_its_own_profile():
    given = png(GREY[..., None], iccp(LINEAR_GREY))
    for format, mode, profile in (("png", "L", LINEAR_GREY), ("jpeg", "L", LINEAR_GREY), ("webp", "RGB", None)):
        result = opened(file_of(bicubic(read_picture(given)), format))
        assert (result.mode, result.info.get("icc_profile")) == (mode, profile)
    assert opened(file_of(bicubic(read_picture(CASES["grey alpha.png"].data)))).mode == "LA"
    assert read_picture(CASES["deep grey alpha.png"].data).pixels_HWC.shape[2] == 2


def test_a_profile_goes_with_its_pixels_and_not_with_others():
    for format in ("png", "jpeg", "webp"):
        picture = read_picture(encoded(PHOTO, "PNG", icc_profile=ADOBE_RGB))
        assert opened(file_of(bicubic(picture), format)).info["icc_profile"] == ADOBE_RGB
    assert opened(file_of(read_picture(png(DEEP, iccp(ADOBE_RGB))))).info["icc_profile"] == ADOBE_RGB
    for name in ("cmyk profile.jpg", "broken profile.jpg", "grey profile of colours.jpg"):
        assert read_picture(CASES[name].data).profile is None


def test_transparency_is_enlarged_bicubically_and_jpeg_refuses_it():
    picture = read_picture(CASES["alpha.png"].data)
    alpha = Image.fromarray(picture.alpha).resize((768, 640), Image.Resampling.BICUBIC)
    for format in ("png", "webp"):
        result = np.asarray(opened(file_of(bicubic(picture), format)).getchannel("A"))
        assert np.abs(result.astype(int) - np.asarray(alpha)).max() <= 1
    with pytest.raises(DeeDSRError, match="transparency, which JPEG cannot keep"):
        require_fit(picture, "jpeg", 4)
    opaque = read_picture(CASES["opaque alpha.png"].data)
    require_fit(opaque, "jpeg", 4)
    assert opened(file_of(opaque, "jpeg")).mode == "RGB"


def test_what_a_format_is_too_small_for_is_said_before_the_work():
    wide = Picture(np.zeros((1, 4096, 3), np.uint8), None, Image.Exif())
    require_fit(wide, "png", 4)
    with pytest.raises(DeeDSRError, match="16384 pixels a side, and webp at most 16383"):
        require_fit(wide, "webp", 4)


def camera_exif() -> Image.Exif:
    tags = exif(6)
    tags.endian = "<"
    tags[ExifTags.Base.Make], tags[ExifTags.Base.Software] = "Maker", "Firmware 1"
    tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength] = 192, 160
    tags[EXIF] = {
        ExifTags.Base.ExposureTime: 0.5, ExifTags.Base.DateTimeOriginal: "2020:02:03 04:05:06",
        ExifTags.Base.ExifImageWidth: 192, ExifTags.Base.ExifImageHeight: 160,
        ExifTags.Base.MakerNote: b"maker's own", INTEROP: {1: "R98"},
    }  # fmt: skip
    tags[GPS] = {1: "N", 2: (47.0, 30.0, 15.0)}
    return tags


def with_thumbnail(tags: Image.Exif) -> bytes:
    """The same EXIF with a second directory that holds a small JPEG."""
    thumbnail = encoded(PHOTO[:40, :48], "JPEG")
    plain = tags.tobytes()[6:]
    count = struct.unpack_from("<H", plain, 8)[0]
    link = 8 + 2 + 12 * count  # place of the offset of the next directory
    entries = [(0x0103, 3, 1, 6), (0x0201, 4, 1, len(plain) + 2 + 36 + 4), (0x0202, 4, 1, len(thumbnail))]
    second = struct.pack("<H", 3) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return b"Exif\0\0" + plain[:link] + struct.pack("<I", len(plain)) + plain[link + 4 :] + second + thumbnail


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_exif_is_kept_and_made_true_for_the_larger_picture(format):
    given = encoded(PHOTO, "JPEG", quality=95, exif=with_thumbnail(camera_exif()))
    assert Image.open(io.BytesIO(given)).getexif().get_ifd(ExifTags.IFD.IFD1)[0x0202] > 100
    file = file_of(bicubic(read_picture(given)), format)
    tags = opened(file).getexif()
    details = tags.get_ifd(EXIF)
    assert (tags[ExifTags.Base.Make], details[ExifTags.Base.ExposureTime]) == ("Maker", 0.5)
    assert details[ExifTags.Base.DateTimeOriginal] == "2020:02:03 04:05:06"
    assert details[ExifTags.Base.MakerNote] == b"maker's own"
    assert tags.get_ifd(INTEROP) == {1: "R98"}
    assert tags.get_ifd(GPS) == {1: "N", 2: (47.0, 30.0, 15.0)}
    assert ExifTags.Base.Orientation not in tags
    assert opened(file).size == (640, 768)
    assert (details[ExifTags.Base.ExifImageWidth], details[ExifTags.Base.ExifImageHeight]) == (640, 768)
    assert ExifTags.Base.ImageWidth not in tags
    assert not tags.get_ifd(ExifTags.IFD.IFD1)
    assert tags[ExifTags.Base.Software].startswith("DeeDSR ")
    assert mark_of(io.BytesIO(file), format) == MARK
    assert mark_of(io.BytesIO(given), "jpeg") is None


def test_exif_that_is_broken_or_too_long_costs_no_picture():
    broken = file_of(read_picture(CASES["broken exif.jpg"].data), "jpeg")
    assert mark_of(io.BytesIO(broken), "jpeg") == MARK
    tags = camera_exif()
    tags[EXIF] |= {ExifTags.Base.MakerNote: bytes(65_200)}
    given = read_picture(encoded(PHOTO, "PNG", exif=tags))
    kept = opened(file_of(given, "jpeg")).getexif()
    assert kept[ExifTags.Base.Make] == "Maker"
    assert ExifTags.Base.MakerNote not in kept.get_ifd(EXIF)


def test_a_tiffs_description_is_kept_and_not_the_places_of_its_pixels():
    image = Image.fromarray(PHOTO)
    given = encoded(image, "TIFF", compression="tiff_lzw", tiffinfo={ExifTags.Base.Artist: "Somebody"})
    tags = opened(file_of(read_picture(given), "jpeg")).getexif()
    assert tags[ExifTags.Base.Artist] == "Somebody"
    assert set(tags) <= {ExifTags.Base.Artist, ExifTags.Base.Software, EXIF, *range(282, 284), 296}


def test_equal_pictures_are_equal_bytes():
    for name in ("deep alpha.png", "alpha.png", "grey.png"):
        first, second = (file_of(unchanged(read_picture(CASES[name].data), "png")) for _ in range(2))
        assert first == second
        assert b"tIME" not in first
