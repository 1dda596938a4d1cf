"""Picture files as the world has them, good and bad, each with what must come of it."""

import io
import struct
import zlib
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

__all__ = ["ADOBE_RGB", "PHOTO", "Case", "cases", "encoded", "png", "tiff"]

BROKEN = "truncated or broken image"
FOREIGN = "not a JPEG, PNG, WebP or TIFF image"
MISNAMED = "content does not match the file's extension"
PIXELS = "too many pixels"
BOMB = "decompression bomb"
UNSUPPORTED = "unsupported pixel format"


class Case(NamedTuple):
    name: str
    data: bytes
    expected: str | np.ndarray  # the reason of its rejection, or its pixels
    tolerance: float = 0  # mean distance of the pixels, levels


with Image.open(str(files("deedsr") / "assets/photos/train/Snow-Trees.jpg")) as _photo:
    PHOTO = np.asarray(_photo.crop((400, 300, 592, 460)))  # (160, 192, 3)
GREY = np.asarray(Image.fromarray(PHOTO).convert("L"))
ALPHA = np.tile(np.linspace(0, 255, 192).astype(np.uint8), (160, 1))
DEEP = PHOTO.astype(np.uint16) * 257 + np.random.default_rng(0).integers(-128, 129, PHOTO.shape)
DEEP = np.clip(DEEP, 0, 65535).astype(np.uint16)


def encoded(image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, -1)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None] / 255
    return np.rint(colour * opacity + 255 * (1 - opacity)).astype(np.uint8)


# PNG and TIFF by hand: what Pillow does not write


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, *chunks: bytes, interlaced: bool = False) -> bytes:
    """uint8 or uint16 (H, W, 1 to 4)."""
    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    passes = [(0, 0, 1, 1)]
    if interlaced:  # Adam7: first row, first column, steps
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    raw = b"".join(
        b"\0" + row.tobytes()
        for top, left, down, right in passes
        for row in pixels.astype(pixels.dtype.newbyteorder(">"))[top::down, left::right]
    )
    header = struct.pack(">IIBBBBB", width, height, pixels.itemsize * 8, colour_type, 0, 0, interlaced)
    body = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(pixels: np.ndarray, photometric: int, big_endian: bool = False, planar: bool = False, **tags: int) -> bytes:
    """One uncompressed strip (or one for each plane) of uint8, uint16 or float32 (H, W, channels)."""
    height, width, channels = pixels.shape
    order = ">" if big_endian else "<"
    stored = pixels.astype(pixels.dtype.newbyteorder(order))
    raw = (stored.transpose(2, 0, 1) if planar else stored).tobytes()
    strips = channels if planar else 1
    fields = {
        256: [tags.get("width", width)],
        257: [tags.get("height", height)],
        258: [pixels.itemsize * 8] * channels,
        259: [1],
        262: [photometric],
        273: [0] * strips,
        277: [channels],
        278: [tags.get("height", height)],
        279: [len(raw) // strips] * strips,
        284: [1 + planar],
        339: [3 if pixels.dtype.kind == "f" else 1] * channels,
    }
    fields |= {number: [tags[name]] for name, number in {"subfile": 254, "orientation": 274}.items() if name in tags}
    fields |= {338: [tags["extra"]]} if "extra" in tags else {}
    start = 14 + 12 * len(fields)  # of the values that don't fit into their entries
    end = start + sum(4 * len(value) for value in fields.values() if len(value) > 1)
    fields[273] = [end + plane * (len(raw) // strips) for plane in range(strips)]
    entries, values = b"", b""
    for tag, value in sorted(fields.items()):
        packed = struct.pack(f"{order}{len(value)}I", *value)
        entry = packed if len(value) == 1 else struct.pack(f"{order}I", start + len(values))
        values += packed if len(value) > 1 else b""
        entries += struct.pack(f"{order}HHI", tag, 4, len(value)) + entry
    head = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(f"{order}IH", 8, len(fields))
    return head + entries + struct.pack(f"{order}I", 0) + values + raw


# ICC profiles

D50 = (0.9642, 1.0, 0.8249)
ADOBE_XYZ = np.array([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)])
SRGB_XYZ = np.array([(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)])


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(exponent: float) -> bytes:
    return b"para" + bytes(8) + struct.pack(">i", round(exponent * 65536))


def icc(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, body, offset = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", offset + len(body), len(value))
        body += value
    size = struct.pack(">I", offset + len(body))
    head = size + bytes(4) + bytes([4, 0, 0, 0]) + kind + space + connection + bytes(12) + b"acsp" + bytes(28)
    return (head + xyz(*D50)[8:]).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


ADOBE_RGB = icc(
    b"mntr",
    b"RGB ",
    b"XYZ ",
    {b"wtpt": xyz(*D50)}
    | {name: xyz(*row) for name, row in zip((b"rXYZ", b"gXYZ", b"bXYZ"), ADOBE_XYZ, strict=True)}
    | {name: gamma(2.19921875) for name in (b"rTRC", b"gTRC", b"bTRC")},
)
LINEAR_GREY = icc(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": xyz(*D50), b"kTRC": gamma(1.0)})
# Lightness falls evenly with black ink, whatever the other inks.
BLACK_INK = icc(
    b"prtr",
    b"CMYK",
    b"Lab ",
    {
        b"wtpt": xyz(*D50),
        b"A2B0": b"mft1\0\0\0\0\4\3\2\0"
        + struct.pack(">9i", *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
        + bytes(range(256)) * 4
        + bytes((255, 128, 128, 0, 128, 128)) * 8
        + bytes(range(256)) * 3,
    },
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def srgb_levels(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return np.rint(255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear))


def from_adobe_rgb(pixels: np.ndarray) -> np.ndarray:
    return srgb_levels((pixels / 255.0) ** 2.19921875 @ ADOBE_XYZ @ np.linalg.inv(SRGB_XYZ))


def from_black_ink(ink: np.ndarray) -> np.ndarray:
    f = (100 * (1 - ink / 255) + 16) / 116
    return rgb(srgb_levels(np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))))


# The files


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
        Case("broken exif.jpg", bad_exif, PHOTO, 2),
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


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


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


def iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile))


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
    pages = encoded(PHOTO, "TIFF", save_all=True, append_images=[Image.fromarray(PHOTO[::-1])])
    cmyk = Image.fromarray(np.dstack([255 - PHOTO, np.zeros_like(GREY)]), "CMYK")
    deep = np.rint(DEEP / 257)
    whole = tiff(PHOTO, 2)
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
        Case("deep.tif", tiff(DEEP, 2), deep),
        Case("deep big endian.tif", tiff(DEEP, 2, big_endian=True), deep),
        Case("deep and turned.tif", tiff(DEEP, 2, orientation=8), np.rot90(deep, 1)),
        Case("deep alpha.tif", tiff(deep_alpha, 2, extra=2), over_white(deep, ALPHA)),
        Case("deep grey.tif", tiff(DEEP[..., :1], 1), rgb(deep[..., 0])),
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
