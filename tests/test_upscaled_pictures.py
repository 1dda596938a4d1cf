"""Claims about what becomes of a picture file around its enlargement: pixels, depth, profile, EXIF, formats."""

import io
import struct

import cv2
import numpy as np
import pytest
from nasty_pictures import cases
from picture_files import (
    ADOBE_CHRM,
    ADOBE_RGB,
    DEEP,
    GREY,
    LINEAR,
    LINEAR_GREY,
    PHOTO,
    chrm,
    cicp,
    encoded,
    exif,
    gama,
    iccp,
    png,
    rgb,
    tiff,
)
from PIL import ExifTags, Image

from deedsr.dataset.colour import ColourSpace
from deedsr.dataset.pictures import decode
from deedsr.errors import DeeDSRError
from deedsr.sampling.images import enlarge
from pipelines.inference.pictures import Picture, encode, exif_of_result, mark_of, read_picture, require_fit

CASES = {case.name: case for case in cases()}
READ = [case for case in CASES.values() if not isinstance(case.expected, str)]
UNREADABLE = [
    case for case in CASES.values() if isinstance(case.expected, str) and "not a JPEG" not in case.expected
    and "does not match" not in case.expected and case.expected != "unsupported colour space"
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
        assert read_picture(CASES[name].data).space.profile is None


def test_colours_that_a_png_states_by_numbers_are_kept_in_every_format():
    given = png((LINEAR >> 8).astype(np.uint8), gama(1), chrm(*ADOBE_CHRM))
    for data in (given, png(LINEAR, gama(1), chrm(*ADOBE_CHRM))):
        result = opened(file_of(bicubic(read_picture(data), deep=True)))
        assert result.info["gamma"] == 1
        assert result.info["chromaticity"] == pytest.approx(ADOBE_CHRM)
    for format in ("jpeg", "webp"):
        assert b"chad" in opened(file_of(bicubic(read_picture(given)), format)).info["icc_profile"]
    grey = opened(file_of(bicubic(read_picture(png(GREY[..., None], gama(1)))), "jpeg"))
    assert (grey.mode, grey.info["icc_profile"][16:20]) == ("L", b"GRAY")
    assert "icc_profile" not in opened(file_of(read_picture(CASES["usual gamma.png"].data), "jpeg")).info


def test_colours_that_no_profile_has_are_kept_by_png_and_refused_by_others():
    light = read_picture(CASES["high dynamic range.png"].data)
    require_fit(light, "png", 4)
    assert cicp(9, 16) in file_of(bicubic(light, deep=True))
    for format in ("jpeg", "webp"):
        with pytest.raises(DeeDSRError, match=f"no ICC profile .* {format} stores only those: choose --format png"):
            require_fit(light, format, 4)


def bmp_with_profile() -> bytes:
    plain = encoded(PHOTO, "BMP")
    size = 124 + len(plain) - 54
    head = struct.pack("<I", 124) + plain[18:54] + bytes(16) + b"DEBM" + bytes(48)
    head += struct.pack("<4I", 0, size, len(ADOBE_RGB), 0)
    file = b"BM" + struct.pack("<IHHI", 14 + size + len(ADOBE_RGB), 0, 0, 138) + head
    return file + plain[54:] + ADOBE_RGB


def jpeg2000_with_profile() -> bytes:
    plain = encoded(PHOTO, "JPEG2000", irreversible=False)
    begin = plain.index(b"colr") - 4
    end = begin + int.from_bytes(plain[begin : begin + 4])
    box = struct.pack(">I", 11 + len(ADOBE_RGB)) + b"colr\2\0\0" + ADOBE_RGB
    head = plain.index(b"jp2h") - 4
    length = int.from_bytes(plain[head : head + 4]) + len(box) - (end - begin)
    return plain[:head] + struct.pack(">I", length) + plain[head + 4 : begin] + box + plain[end:]


def avif_with_code_points(primaries: int, transfer: int) -> bytes:
    plain = encoded(PHOTO, "AVIF", quality=100, subsampling="4:4:4")
    place = plain.index(b"colrnclx") + 8
    return plain[:place] + struct.pack(">HH", primaries, transfer) + plain[place + 4 :]


def test_profiles_and_code_points_of_other_formats_are_kept():
    for data in (bmp_with_profile(), jpeg2000_with_profile()):
        result = opened(file_of(read_picture(data)))
        assert result.info["icc_profile"] == ADOBE_RGB
        np.testing.assert_array_equal(np.asarray(result), PHOTO)
    shown = decode(file_of(read_picture(avif_with_code_points(12, 13)), "webp"))
    assert np.abs(shown - CASES["display p3.png"].expected.astype(float)).mean() < 5
    assert not read_picture(avif_with_code_points(9, 16)).space.known
    assert read_picture(avif_with_code_points(1, 1)).space.profile is None


@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 0, 255)])
def test_the_edge_of_a_transparent_picture_has_the_colour_of_what_is_visible(format, hidden):
    y, x = np.mgrid[:48, :48]
    inside = np.hypot(y - 24, x - 24) < 14
    for shade in ((255, 240, 210), (200, 200, 200)):
        colour = np.where(inside[..., None], shade, hidden if shade[0] > 200 else hidden[:1] * 3).astype(np.uint8)
        alpha = np.where(inside, 255, 0).astype(np.uint8)[..., None]
        given = [np.concatenate([colour, alpha], -1), np.concatenate([colour, alpha], -1).astype(np.uint16) * 257]
        if shade[0] == 200:
            given.append(np.concatenate([colour[..., :1], alpha], -1))
        for pixels in given:
            picture = read_picture(png(pixels))
            result = np.asarray(opened(file_of(bicubic(picture), format)).convert("RGBA")).astype(int)
            edge = (result[..., 3] > 12) & (result[..., 3] < 243)
            assert edge.any()
            assert np.abs(result[edge][:, :3] - shade).max() <= (1 if format == "png" else 12)
    gone = read_picture(png(np.zeros((16, 16, 4), np.uint8)))
    assert np.asarray(opened(file_of(bicubic(gone), "png"))).max() == 0


def coloured(picture: Picture) -> Picture:
    """As by a network that adds coloured noise."""
    noise = np.random.default_rng(0).normal(0, 0.1, picture.rgb().shape).astype(np.float32)
    return picture.enlarged((picture.rgb() + noise).clip(0, 1), deep=picture.deep)


GREY_FILES = {
    "RGB": png(rgb(GREY)),
    "16 bits": png(rgb(GREY).astype(np.uint16) * 257),
    "palette": encoded(Image.fromarray(rgb(GREY)).quantize(64), "PNG"),
    "JPEG": encoded(rgb(GREY), "JPEG", quality=70),
    "WebP": encoded(rgb(GREY), "WEBP", quality=40),
    "TIFF": tiff(rgb(GREY), 2),
    "CMYK": encoded(Image.fromarray(np.dstack([np.zeros_like(PHOTO), 255 - GREY]), "CMYK"), "JPEG", quality=95),
    "colour that is transparent": png(np.dstack([np.where(PHOTO > 99, PHOTO, rgb(GREY)), np.where(
        (PHOTO > 99).any(-1), 0, 255
    )]).astype(np.uint8)),
}  # fmt: skip


@pytest.mark.parametrize("name", GREY_FILES)
def test_grey_that_is_stored_as_colours_stays_grey(name):
    picture = read_picture(GREY_FILES[name])
    assert not picture.grey
    pixels = coloured(picture).pixels_HWC[..., :3]
    assert pixels.std() > 1
    np.testing.assert_array_equal(pixels, pixels[..., :1].repeat(3, -1))


def test_a_tint_is_a_colour():
    for tint in ((2, 0, 0), (0, 0, -9)):
        sepia = (rgb(GREY).astype(int) + tint).clip(0, 255).astype(np.uint8)
        assert not read_picture(png(sepia)).neutral
    assert not read_picture(png(DEEP)).neutral


def netpbm(kind: str, pixels: np.ndarray, highest: int) -> bytes:
    head = f"{kind}\n# as of a scanner\n{pixels.shape[1]} {pixels.shape[0]}\n{highest}\n".encode()
    if kind == "P3":
        return head + " ".join(map(str, pixels.flatten())).encode() + b"\n"
    return head + pixels.astype(">u2").tobytes()


def test_premultiplied_colours_of_sixteen_bits_are_divided_and_keep_them():
    picture = read_picture(CASES["deep premultiplied alpha.tif"].data)
    seen = picture.pixels_HWC[..., 3] > 9999
    assert picture.deep
    assert np.abs(picture.pixels_HWC[..., :3].astype(int) - DEEP)[seen].max() <= 4


def test_more_than_eight_bits_of_other_formats_are_read_as_well():
    grey = DEEP[..., 0]
    files = {
        "ppm": netpbm("P6", DEEP, 65535), "plain ppm": netpbm("P3", DEEP, 65535), "pgm": netpbm("P5", grey, 65535),
        "ppm of 10 bits": netpbm("P6", DEEP >> 6, 1023), "pgm of 10 bits": netpbm("P5", grey >> 6, 1023),
        "jp2": cv2.imencode(".jp2", DEEP[..., ::-1], [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])[1].tobytes(),
    }  # fmt: skip
    for name, data in files.items():
        picture = read_picture(data)
        expected = DEEP if picture.pixels_HWC.shape[2] == 3 else grey[..., None]
        assert picture.deep, name
        assert np.abs(picture.pixels_HWC.astype(int) - expected).mean() < (64 if "10" in name else 1), name


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
    wide = Picture(np.zeros((1, 4096, 3), np.uint8), ColourSpace(), Image.Exif())
    require_fit(wide, "png", 16384)
    with pytest.raises(DeeDSRError, match="16384 pixels a side, and webp at most 16383"):
        require_fit(wide, "webp", 16384)


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
