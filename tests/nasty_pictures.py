"""Picture files as the world has them, good and bad, each with what must come of it."""

import struct
import zlib
from typing import NamedTuple

import numpy as np
from picture_files import (
    ADOBE_CHRM,
    ADOBE_RGB,
    ALPHA,
    BLACK_INK,
    DEEP,
    GREY,
    LINEAR,
    LINEAR_GREY,
    PHOTO,
    SRGB,
    SRGB_CHRM,
    chrm,
    chunk,
    cicp,
    colour_exif,
    encoded,
    exif,
    few_bits_png,
    from_adobe_rgb,
    from_black_ink,
    from_display_p3,
    from_linear,
    gama,
    iccp,
    over_white,
    png,
    rgb,
    srgb_levels,
    tiff,
)
from PIL import Image

BROKEN = "truncated or broken image"
FOREIGN = "not a JPEG, PNG, WebP or TIFF image"
MISNAMED = "content does not match the file's extension"
PIXELS = "too many pixels"
BOMB = "decompression bomb"
UNSUPPORTED = "unsupported pixel format"
COLOURS = "unsupported colour space"


class Case(NamedTuple):
    name: str
    data: bytes
    expected: str | np.ndarray  # the reason of its rejection, or its pixels
    tolerance: float = 0  # mean distance of the pixels, levels


QUALITY = {"quality": 95, "subsampling": 0}


def jpegs() -> list[Case]:
    whole = encoded(PHOTO, "JPEG", **QUALITY)
    progressive = encoded(PHOTO, "JPEG", progressive=True, **QUALITY)
    restarts = encoded(PHOTO, "JPEG", restart_marker_rows=1, **QUALITY)
    coloured = np.dstack([255 - PHOTO, np.zeros_like(GREY)])
    black = Image.fromarray(np.dstack([np.zeros_like(PHOTO), GREY]), "CMYK")
    cmyk = encoded(Image.fromarray(coloured, "CMYK"), "JPEG", quality=95)
    rare = encoded(Image.fromarray(coloured, "CMYK"), "JPEG", quality=95, subsampling=2)
    # Pillow stores the ink that is missing, and so says libjpeg's Adobe marker: undo both.
    inverted = Image.fromarray(~coloured, "CMYK")
    plain = without_adobe(encoded(inverted, "JPEG", quality=95))
    plain_rare = without_adobe(encoded(inverted, "JPEG", quality=95, subsampling=2))
    frame = whole.index(b"\xff\xc0") + 5
    huge = whole[:frame] + struct.pack(">HH", 65000, 65000) + whole[frame + 4 :]
    scan = progressive.rindex(b"\xff\xda")
    many_scans = progressive[:scan] + progressive[scan:-2] * 1000 + b"\xff\xd9"
    video = b"\0\0\0\x18ftypmp42" + b"\xff\xda" * 1000
    apart = whole[: whole.rindex(b"\xff\xda")] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 1000 + b"\xff\xd9"
    middle = len(whole) // 2
    second = Image.fromarray(PHOTO[::-1])
    mpo = encoded(Image.fromarray(PHOTO), "MPO", save_all=True, append_images=[second], **QUALITY)
    bad_exif = encoded(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(60000), **QUALITY)
    return [
        Case("baseline.jpg", whole, PHOTO, 2),
        Case("shouting.JPG", whole, PHOTO, 2),
        Case("progressive.jpeg", progressive, PHOTO, 2),
        Case("chroma halved.jpg", encoded(PHOTO, "JPEG", quality=95, subsampling=2), PHOTO, 5),
        Case("restarts.jpg", restarts, PHOTO, 2),
        Case("grey.jpg", encoded(GREY, "JPEG", quality=95), rgb(GREY), 2),
        Case("cmyk.jpg", cmyk, PHOTO, 3),
        Case("cmyk of rare subsampling.jpg", rare, PHOTO, 15),
        Case("cmyk without adobe.jpg", plain, PHOTO, 3),
        Case("cmyk of rare subsampling without adobe.jpg", plain_rare, PHOTO, 15),
        Case("cmyk profile.jpg", encoded(black, "JPEG", quality=95, icc_profile=BLACK_INK), from_black_ink(GREY), 2),
        Case("cmyk broken profile.jpg", encoded(black, "JPEG", quality=95, icc_profile=b"x" * 200), rgb(255 - GREY), 2),
        Case("adobe rgb.jpg", encoded(PHOTO, "JPEG", icc_profile=ADOBE_RGB, **QUALITY), from_adobe_rgb(PHOTO), 3),
        Case("broken profile.jpg", encoded(PHOTO, "JPEG", icc_profile=ADOBE_RGB[:150], **QUALITY), PHOTO, 2),
        Case("grey profile of colours.jpg", encoded(PHOTO, "JPEG", icc_profile=LINEAR_GREY, **QUALITY), PHOTO, 2),
        *(
            Case(f"orientation {number}.jpg", encoded(PHOTO, "JPEG", exif=exif(number), **QUALITY), upright, 2)
            for number, upright in TURNED.items()
        ),
        *(
            Case(f"exif says {name}.jpg", encoded(PHOTO, "JPEG", exif=colour_exif(*says), **QUALITY), shown, 3)
            for name, says, shown in (
                ("adobe rgb", (2,), from_adobe_rgb(PHOTO)),
                ("R03", (0xFFFF, "R03"), from_adobe_rgb(PHOTO)),
                ("srgb", (1, "R98"), PHOTO),
                ("nothing", (0xFFFF,), PHOTO),
            )
        ),
        Case(
            "exif says srgb, profile adobe rgb.jpg",
            encoded(PHOTO, "JPEG", exif=colour_exif(1), icc_profile=ADOBE_RGB, **QUALITY),
            from_adobe_rgb(PHOTO),
            3,
        ),
        Case("broken exif.jpg", bad_exif, PHOTO, 2),
        Case("video behind.jpg", whole + video, PHOTO, 2),
        Case("video behind progressive.jpg", progressive + video, PHOTO, 2),
        Case("a thousand scans of one colour.jpg", apart, BOMB),
        Case("several pictures.jpg", mpo, PHOTO, 2),
        Case("bytes after the end.jpg", whole + b"camera" * 1000, PHOTO, 2),
        Case("bytes before the end.jpg", whole[:-2] + b"\0\0\0\0" + whole[-2:], PHOTO, 2),
        Case("half.jpg", whole[:middle], BROKEN),
        Case("half progressive.jpg", progressive[: len(progressive) // 2], BROKEN),
        Case("all but the end marker.jpg", whole[:-2], BROKEN),
        Case("all but a byte, with restarts.jpg", restarts[:-1], BROKEN),
        Case("half with an end marker.jpg", whole[:middle] + b"\xff\xd9", BROKEN),
        Case("near the end with an end marker.jpg", whole[:-300] + b"\xff\xd9", BROKEN),
        Case("zeros within.jpg", whole[:middle] + bytes(400) + whole[middle + 400 :], BROKEN),
        Case("zeros from the middle.jpg", whole[:middle] + bytes(len(whole) - middle), BROKEN),
        Case("header alone.jpg", whole[:frame], BROKEN),
        Case("three bytes.jpg", whole[:3], BROKEN),
        Case("huge header.jpg", huge, PIXELS),
        Case("a thousand scans.jpg", many_scans, BOMB),
        Case("jpeg called.png", whole, MISNAMED),
        Case("jpeg called.tiff", whole, MISNAMED),
        Case("jpeg of no name", whole, PHOTO, 2),
    ]


def without_adobe(jpeg: bytes) -> bytes:
    marker = jpeg.index(b"\xff\xee")
    return jpeg[:marker] + jpeg[marker + 16 :]


TURNED = {
    1: PHOTO,
    2: PHOTO[:, ::-1],
    3: PHOTO[::-1, ::-1],
    4: PHOTO[::-1],
    5: PHOTO.transpose(1, 0, 2),
    6: np.rot90(PHOTO, -1),
    7: PHOTO[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(PHOTO, 1),
    9: PHOTO,
}


def pngs() -> list[Case]:
    whole = png(PHOTO)
    palette = Image.fromarray(PHOTO).quantize(64)
    index = np.asarray(palette)
    see_through = np.asarray(palette.convert("RGB")).copy()
    see_through[index == 0] = 255
    bits = Image.fromarray(GREY).convert("1")
    holes = np.where(GREY[0, 0] == GREY, 255, GREY)
    deep_grey = DEEP[..., :1]
    deep_hole = np.rint(deep_grey[..., 0] / 257)
    deep_hole[deep_grey[..., 0] == deep_grey[0, 0, 0]] = 255
    colour_hole = PHOTO.copy()
    colour_hole[(PHOTO[0, 0] == PHOTO).all(-1)] = 255
    deep_alpha = (ALPHA.astype(np.uint16) * 257)[..., None]
    huge = whole[:12] + chunk(b"IHDR", struct.pack(">II", 20000, 20000) + whole[24:29])[4:] + whole[33:]
    flat = zlib.compress(bytes(200_000_000), 9)
    middle = len(whole) // 2
    return [
        Case("plain.png", whole, PHOTO),
        Case("interlaced.png", png(PHOTO, interlaced=True), PHOTO),
        Case("palette.png", encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        Case("palette with a hole.png", encoded(palette, "PNG", transparency=0), see_through),
        Case("one bit.png", encoded(bits, "PNG"), rgb(np.asarray(bits.convert("L")))),
        Case("grey.png", png(GREY[..., None]), rgb(GREY)),
        Case("grey with a hole.png", png(GREY[..., None], chunk(b"tRNS", bytes([0, GREY[0, 0]]))), rgb(holes)),
        *(
            Case(
                f"grey of {bits} bits with a hole.png",
                few_bits_png(GREY >> (8 - bits), bits, chunk(b"tRNS", bytes([0, 1]))),
                rgb(np.where(GREY >> (8 - bits) == 1, 255, (GREY >> (8 - bits)) * (255 // (2**bits - 1)))),
            )
            for bits in (1, 2, 4)
        ),
        Case("colour with a hole.png", encoded(PHOTO, "PNG", transparency=tuple(map(int, PHOTO[0, 0]))), colour_hole),
        Case("grey alpha.png", png(np.dstack([GREY, ALPHA])), over_white(rgb(GREY), ALPHA)),
        Case("alpha.png", png(np.dstack([PHOTO, ALPHA])), over_white(PHOTO, ALPHA)),
        Case("opaque alpha.png", png(np.dstack([PHOTO, np.full_like(GREY, 255)])), PHOTO),
        Case("deep.png", png(DEEP), np.rint(DEEP / 257)),
        Case("deep grey.png", png(deep_grey), rgb(np.rint(deep_grey[..., 0] / 257))),
        Case(
            "deep grey with a hole.png",
            png(deep_grey, chunk(b"tRNS", struct.pack(">H", int(deep_grey[0, 0, 0])))),
            rgb(deep_hole),
        ),
        Case("deep alpha.png", png(np.dstack([DEEP, deep_alpha])), over_white(np.rint(DEEP / 257), ALPHA)),
        Case(
            "deep grey alpha.png",
            png(np.dstack([deep_grey, deep_alpha])),
            over_white(rgb(np.rint(deep_grey[..., 0] / 257)), ALPHA),
        ),
        Case("adobe rgb.png", encoded(PHOTO, "PNG", icc_profile=ADOBE_RGB), from_adobe_rgb(PHOTO), 1),
        Case("deep adobe rgb.png", png(DEEP, iccp(ADOBE_RGB)), from_adobe_rgb(PHOTO), 1),
        Case("srgb profile.png", encoded(PHOTO, "PNG", icc_profile=SRGB), PHOTO),
        Case("grey profile.png", png(GREY[..., None], iccp(LINEAR_GREY)), rgb(srgb_levels(GREY / 255)), 1),
        Case("linear.png", png(LINEAR, gama(1)), PHOTO, 0.5),
        Case("linear of 8 bits.png", png((LINEAR >> 8).astype(np.uint8), gama(1)), from_linear(LINEAR >> 8 << 8), 1),
        Case("linear grey.png", png(GREY[..., None], gama(1)), rgb(from_linear(GREY)), 1),
        Case("usual gamma.png", png(PHOTO, gama(1 / 2.2), chrm(*SRGB_CHRM)), PHOTO),
        Case("gamma of 2.2 alone.png", png(PHOTO, gama(1 / 2.2)), PHOTO),
        Case("adobe primaries.png", png(PHOTO, gama(256 / 563), chrm(*ADOBE_CHRM)), from_adobe_rgb(PHOTO), 1),
        Case("srgb chunk beside gamma.png", png(PHOTO, gama(1), chunk(b"sRGB", b"\0")), PHOTO),
        Case("profile beside gamma.png", png(PHOTO, iccp(ADOBE_RGB), gama(1)), from_adobe_rgb(PHOTO), 1),
        Case("display p3.png", png(PHOTO, cicp(12, 13)), from_display_p3(PHOTO), 1),
        Case("code points beside profile.png", png(PHOTO, iccp(ADOBE_RGB), cicp(1, 13)), PHOTO),
        Case("gamma of nothing.png", png(PHOTO, chunk(b"gAMA", bytes(4)), chrm(*[0] * 8)), PHOTO),
        Case("high dynamic range.png", png(DEEP, cicp(9, 16)), COLOURS),
        Case("narrow range.png", png(PHOTO, cicp(1, 13, full=0)), COLOURS),
        Case("bytes after the end.png", whole + b"x" * 1000, PHOTO),
        Case("turned.png", encoded(PHOTO, "PNG", exif=exif(6)), TURNED[6]),
        Case(
            "deep and turned.png", png(DEEP, chunk(b"eXIf", exif(6).tobytes()[6:])), np.rot90(np.rint(DEEP / 257), -1)
        ),
        Case("broken exif.png", png(PHOTO, chunk(b"eXIf", b"no TIFF header")), PHOTO),
        Case("animated.png", animated("PNG"), PHOTO),
        Case("much text.png", png(PHOTO, chunk(b"iTXt", b"a\0\0\0\0\0" + b"x" * 2_000_000)), PHOTO),
        Case("half.png", whole[:middle], BROKEN),
        Case("half deep.png", png(DEEP)[: DEEP.size], BROKEN),
        Case("last rows missing.png", whole[:-100], BROKEN),
        Case("wrong checksum.png", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], BROKEN),
        Case("last chunk missing.png", whole[:-12], BROKEN),
        Case("no pixels.png", whole[:33] + chunk(b"IEND", b""), BROKEN),
        Case("no width.png", png(PHOTO[:, :0]), BROKEN),
        Case("huge header.png", huge, PIXELS),
        Case("text bomb.png", png(PHOTO, chunk(b"iTXt", b"a\0\1\0\0\0" + flat)), BOMB),
        Case("profile bomb.png", png(PHOTO, chunk(b"iCCP", b"a\0\0" + flat)), BOMB),
        Case("png called.jpg", whole, MISNAMED),
    ]


def animated(format: str) -> bytes:
    """Three frames, all lossless."""
    frames = [Image.fromarray(PHOTO[::-1]), Image.fromarray(PHOTO[:, ::-1])]
    return encoded(PHOTO, format, save_all=True, append_images=frames, lossless=True)


def webps() -> list[Case]:
    lossless = encoded(PHOTO, "WEBP", lossless=True)
    alpha = np.dstack([PHOTO, ALPHA])
    clear = encoded(alpha, "WEBP", lossless=True, exact=True)
    extended = encoded(alpha, "WEBP", quality=90)
    assert extended[12:16] == b"VP8X"
    wide = extended[:24] + b"\xff\xff\0" * 2 + extended[30:]
    return [
        Case("lossy.webp", encoded(PHOTO, "WEBP", quality=95), PHOTO, 6),
        Case("lossless.webp", lossless, PHOTO),
        Case("alpha.webp", clear, over_white(PHOTO, ALPHA)),
        Case("bytes after the end.webp", lossless + b"x" * 1000, PHOTO),
        Case("turned.webp", encoded(PHOTO, "WEBP", lossless=True, exif=exif(8)), TURNED[8]),
        Case("adobe rgb.webp", encoded(PHOTO, "WEBP", lossless=True, icc_profile=ADOBE_RGB), from_adobe_rgb(PHOTO), 1),
        Case("animated.webp", animated("WEBP"), PHOTO),
        Case("half.webp", lossless[: len(lossless) // 2], BROKEN),
        Case("last byte missing.webp", lossless[:-2], BROKEN),
        Case("header alone.webp", lossless[:20], BROKEN),
        Case("huge header.webp", wide, PIXELS),
        Case("webp called.png", lossless, MISNAMED),
    ]


def tiffs() -> list[Case]:
    photo = Image.fromarray(PHOTO)
    palette = photo.quantize(64)
    bits = Image.fromarray(GREY).convert("1")
    alpha = np.dstack([PHOTO, ALPHA])
    deep_alpha = np.dstack([DEEP, ALPHA.astype(np.uint16) * 257])
    premultiplied = np.dstack([np.rint(DEEP * (ALPHA[..., None] / 255)), deep_alpha[..., 3]]).astype(np.uint16)
    pages = encoded(PHOTO, "TIFF", save_all=True, append_images=[Image.fromarray(PHOTO[::-1])])
    cmyk = Image.fromarray(np.dstack([255 - PHOTO, np.zeros_like(GREY)]), "CMYK")
    deep = np.rint(DEEP / 257)
    whole = tiff(PHOTO, 2)
    table = [round(65535 * (level / 255) ** 2.19921875) for level in range(256)]
    primaries = {318: ADOBE_CHRM[:2], 319: ADOBE_CHRM[2:], 301: table}
    deflated = encoded(photo, "TIFF", compression="tiff_adobe_deflate")
    return [
        Case("plain.tif", whole, PHOTO),
        Case("plain.tiff", encoded(photo, "TIFF"), PHOTO),
        Case("lzw.tif", encoded(photo, "TIFF", compression="tiff_lzw"), PHOTO),
        Case("deflate.tif", deflated, PHOTO),
        Case("jpeg inside.tif", encoded(photo, "TIFF", compression="jpeg", quality=95), PHOTO, 5),
        Case("fax.tif", encoded(bits, "TIFF", compression="group4"), rgb(np.asarray(bits.convert("L")))),
        Case("palette.tif", encoded(palette, "TIFF"), np.asarray(palette.convert("RGB"))),
        Case("big endian.tif", tiff(PHOTO, 2, big_endian=True), PHOTO),
        Case("planes.tif", tiff(PHOTO, 2, planar=True), PHOTO),
        Case("negative.tif", tiff(GREY[..., None], 0), rgb(255 - GREY)),
        Case("turned.tif", tiff(PHOTO, 2, orientation=6), TURNED[6]),
        Case("alpha.tif", tiff(alpha, 2, extra=2), over_white(PHOTO, ALPHA)),
        Case("cmyk.tif", encoded(cmyk, "TIFF"), PHOTO),
        Case("pages.tif", pages, PHOTO),
        Case("adobe rgb.tif", encoded(photo, "TIFF", icc_profile=ADOBE_RGB), from_adobe_rgb(PHOTO), 1),
        Case("adobe primaries.tif", encoded(photo, "TIFF", tiffinfo=primaries), from_adobe_rgb(PHOTO), 1),
        Case("usual primaries.tif", encoded(photo, "TIFF", tiffinfo={318: SRGB_CHRM[:2], 319: SRGB_CHRM[2:]}), PHOTO),
        Case("deep.tif", tiff(DEEP, 2), deep),
        Case("deep big endian.tif", tiff(DEEP, 2, big_endian=True), deep),
        Case("deep and turned.tif", tiff(DEEP, 2, orientation=8), np.rot90(deep, 1)),
        Case("deep alpha.tif", tiff(deep_alpha, 2, extra=2), over_white(deep, ALPHA)),
        Case("deep premultiplied alpha.tif", tiff(premultiplied, 2, extra=1), over_white(deep, ALPHA), 0.5),
        Case("deep grey.tif", tiff(DEEP[..., :1], 1), rgb(deep[..., 0])),
        Case("deep grey alpha.tif", tiff(np.dstack([DEEP[..., :1], deep_alpha[..., 3:]]), 1, extra=2), UNSUPPORTED),
        Case("deep palette.tif", tiff(DEEP[..., :1], 3), UNSUPPORTED),
        Case("colours of 32 bits.tif", tiff(PHOTO.astype(np.float32), 2), UNSUPPORTED),
        Case("deep negative.tif", tiff(DEEP[..., :1], 0), rgb(255 - deep[..., 0])),
        Case("deep planes.tif", tiff(DEEP, 2, planar=True), UNSUPPORTED),
        Case("floats.tif", tiff(PHOTO[..., :1].astype(np.float32), 1), UNSUPPORTED),
        Case("32 bits.tif", encoded(GREY.astype(np.int32), "TIFF"), UNSUPPORTED),
        Case("preview of a raw file.tif", tiff(PHOTO, 2, subfile=1), UNSUPPORTED),
        Case("lab.tif", encoded(Image.fromarray(PHOTO, "LAB"), "TIFF"), UNSUPPORTED),
        Case("half.tif", whole[: len(whole) // 2], BROKEN),
        Case("last bytes missing.tif", whole[:-10], BROKEN),
        Case("half deflate.tif", deflated[: len(deflated) // 2], BROKEN),
        Case("header alone.tif", whole[:8], BROKEN),
        Case("huge header.tif", tiff(PHOTO, 2, width=200000, height=200000), PIXELS),
        Case("tiff called.jpeg", whole, MISNAMED),
    ]


def others() -> list[Case]:
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    return [
        Case("empty.jpg", b"", "empty file"),
        Case("zeros.jpg", bytes(4096), FOREIGN),
        Case("page.jpg", b"<!DOCTYPE html><html>404 not found</html>", FOREIGN),
        Case("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', FOREIGN),
        Case("document.tif", b"%PDF-1.7\n", FOREIGN),
        Case("moving.gif", encoded(PHOTO, "GIF"), FOREIGN),
        Case("gif called.png", encoded(PHOTO, "GIF"), FOREIGN),
        Case("bitmap.bmp", encoded(PHOTO, "BMP"), FOREIGN),
        Case("phone.heic", b"\0\0\0\x18ftypheic" + bytes(4096), FOREIGN),
        Case("new.avif", encoded(PHOTO, "AVIF"), FOREIGN),
        Case("wave.webp", b"RIFF\x24\0\0\0WAVEfmt " + bytes(64), FOREIGN),
        Case("too small.png", png(noise), noise),
        Case("too flat.png", png(np.full((160, 192, 3), 90, np.uint8)), np.full((160, 192, 3), 90)),
    ]


def cases() -> list[Case]:
    return [*jpegs(), *pngs(), *webps(), *tiffs(), *others()]
