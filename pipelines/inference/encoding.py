"""The files of results: PNG, JPEG and WebP, with equal bytes for equal pictures."""

import io
import struct
import zlib
from collections.abc import Iterable
from typing import Literal

import numpy as np
from PIL import Image

from deedsr.dataset.colour import to_srgb
from deedsr.errors import DeeDSRError
from pipelines.inference.pictures import Picture

__all__ = ["EXTENSIONS", "LOSSY", "Format", "encode", "format_of", "holds_deep", "require_fit"]

Format = Literal["png", "jpeg", "webp", "same"]
EXTENSIONS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "jpe": "jpeg", "jfif": "jpeg", "webp": "webp"}
LOSSY = ("jpeg", "webp")
_LARGEST_SIDE = {"png": 2**31 - 1, "jpeg": 65500, "webp": 16383}  # pixels, of the libraries
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def format_of(path: str) -> str:
    """`png`, `jpeg` or `webp`, by the extension of a result."""
    return EXTENSIONS[path.rpartition(".")[2].lower()]


def holds_deep(format: str) -> bool:
    """Whether a format has 16 bits for each channel."""
    return format == "png"


def require_fit(picture: Picture, format: str, scale: int) -> None:
    """Raises DeeDSRError before the work where the format could not hold the result."""
    if format == "jpeg" and not picture.opaque:
        raise DeeDSRError("it has transparency, which JPEG cannot keep: choose --format png or webp")
    if format != "png" and not picture.space.known:
        raise DeeDSRError(f"no ICC profile describes its colours, and {format} stores only those: choose --format png")
    side = scale * max(picture.pixels_HWC.shape[:2])
    if side > _LARGEST_SIDE[format]:
        raise DeeDSRError(
            f"its result has {side} pixels a side, and {format} at most {_LARGEST_SIDE[format]}: choose --format png"
        )


def encode(picture: Picture, exif: bytes, format: str, quality: int) -> bytes:
    """A file with the picture's pixels and colour space; `exif` as in PNG's chunk, `quality` of JPEG and WebP."""
    pixels_HWC = picture.pixels_HWC
    if format == "jpeg" and picture.alpha is not None:
        pixels_HWC = pixels_HWC[..., :-1]
    if pixels_HWC.dtype == np.uint16:
        return _with_chunks(_deep_png(pixels_HWC, picture.space.profile, exif), picture.space.chunks)
    profile = picture.space.profile
    if format == "webp" and picture.grey and profile:  # WebP has no grey, and its profile would not fit
        level_HW1 = to_srgb(np.ascontiguousarray(pixels_HWC[..., 0]), profile)[..., :1]
        pixels_HWC, profile = np.concatenate([level_HW1, pixels_HWC[..., 1:]], -1), None
    channels = pixels_HWC.shape[2]
    image = Image.fromarray(np.ascontiguousarray(pixels_HWC[..., 0] if channels == 1 else pixels_HWC), _MODES[channels])
    options: dict[str, object] = {}
    if format == "jpeg":
        options = {"quality": quality, "subsampling": 0}  # the detail that was made is in the chroma too
    elif format == "webp":
        options = {"quality": quality}
    file = io.BytesIO()
    image.save(file, format, icc_profile=profile, exif=b"Exif\0\0" + exif, **options)
    return _with_chunks(file.getvalue(), picture.space.chunks) if format == "png" else file.getvalue()


def _deep_png(pixels_HWC: np.ndarray, profile: bytes | None, exif: bytes) -> bytes:
    """A PNG of 16 bits, which Pillow writes for grey alone and OpenCV without profile and EXIF."""
    height, width, channels = pixels_HWC.shape
    rows = pixels_HWC.astype(">u2").view(np.uint8).reshape(height, -1)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    up = np.full((height, 1), 2, np.uint8)  # the number of the filter that stores differences to the row above
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    if profile:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile)))
    chunks += [(b"eXIf", exif), (b"IDAT", zlib.compress(np.hstack([up, rows - above]).tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _with_chunks(png: bytes, chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The chunks behind the header, in front of palette and pixels as they must be."""
    return png[:33] + b"".join(_chunk(kind, data) for kind, data in chunks) + png[33:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
