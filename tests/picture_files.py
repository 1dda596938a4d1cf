"""Picture files for tests, and what Pillow does not write: by hand."""

import io
import struct
import zlib
from importlib.resources import files

import numpy as np
from PIL import Image, ImageCms

with Image.open(str(files("deedsr") / "assets/photos/train/Snow-Trees.jpg")) as _photo:
    PHOTO = np.asarray(_photo.crop((400, 300, 592, 460)))  # (160, 192, 3)
GREY = np.asarray(Image.fromarray(PHOTO).convert("L"))
ALPHA = np.tile(np.linspace(0, 255, 192).astype(np.uint8), (160, 1))
DEEP = PHOTO.astype(np.uint16) * 257 + np.random.default_rng(0).integers(-128, 129, PHOTO.shape)
DEEP = np.clip(DEEP, 0, 65535).astype(np.uint16)
LINEAR = np.rint(65535 * np.where(PHOTO > 10, ((PHOTO / 255 + 0.055) / 1.055) ** 2.4, PHOTO / 255 / 12.92))
LINEAR = LINEAR.astype(np.uint16)  # PHOTO as amounts of light


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


def few_bits_png(levels_HW: np.ndarray, bits: int, *chunks: bytes) -> bytes:
    """Grey of 1, 2 or 4 bits, from levels that fit."""
    height, width = levels_HW.shape
    packed = np.packbits(np.unpackbits(levels_HW[..., None], axis=2)[..., -bits:].reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    raw = b"".join(b"\0" + row.tobytes() for row in packed)
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


def from_linear(pixels: np.ndarray) -> np.ndarray:
    return srgb_levels(pixels / np.iinfo(pixels.dtype).max)


def from_display_p3(pixels: np.ndarray) -> np.ndarray:
    value = pixels / 255.0
    light = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    return srgb_levels(light @ P3_TO_SRGB)


P3_TO_SRGB = np.array([(1.22494, -0.04206, -0.01964), (-0.22494, 1.04206, -0.07864), (0, 0, 1.09827)])


def from_black_ink(ink: np.ndarray) -> np.ndarray:
    f = (100 * (1 - ink / 255) + 16) / 116
    return rgb(srgb_levels(np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))))


def iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile))


def gama(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(value * 1e5)))


def chrm(*numbers: float) -> bytes:
    """x and y of white, red, green and blue"""
    return chunk(b"cHRM", struct.pack(">8I", *(round(number * 1e5) for number in numbers)))


def cicp(primaries: int, transfer: int, full: int = 1) -> bytes:
    return chunk(b"cICP", bytes([primaries, transfer, 0, full]))


SRGB_CHRM = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
ADOBE_CHRM = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def colour_exif(space: int, interoperability: str = "") -> Image.Exif:
    tags = Image.Exif()
    tags[0x8769] = {0xA001: space} | ({0xA005: {1: interoperability}} if interoperability else {})
    return tags
