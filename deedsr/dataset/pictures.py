"""From the bytes of a picture file to its pixels, or the reason why it gives none.

`decode` is for sources of a dataset: 8-bit sRGB, upright, opaque. `read_stored` gives the pixels as the file has them.

Every step is integer arithmetic that is the same on every processor: libjpeg-turbo's exact DCT and upsampling, fixed
point in lcms2, rounding by integers here.
"""

import io
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.TiffImagePlugin import PLANAR_CONFIGURATION, TiffImageFile

__all__ = ["MAX_PIXELS", "RejectedImage", "Stored", "decode", "read_stored", "to_srgb", "upright"]

MAX_PIXELS = 2**29 // 3  # 179 megapixels: 512 MiB as RGB; read from the header, before any pixel has a place
MAX_SCANS = 200  # of a progressive JPEG, which has about ten; each pass over an empty scan costs as much as a full one

_SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
}
_OTHERS = ("BMP", "GIF", "PPM", "JPEG2000", "AVIF")  # of Pillow; none that calls another program, as EPS does
_EXTENSIONS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "jpe": "JPEG",
    "jfif": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "tif": "TIFF",
    "tiff": "TIFF",
}
_ORIENTATION, _SUBFILE_TYPE, _BITS, _PHOTOMETRIC, _EXTRA_SAMPLES = 274, 254, 258, 262, 338  # TIFF's and EXIF's tags

_EIGHT_OF_SIXTEEN = ((np.arange(2**16) + 128) // 257).astype(np.uint8)  # 65535 / 257 = 255, rounded

_BROKEN = "truncated or broken image"
_UNSUPPORTED = "unsupported pixel format"

# What libjpeg remarks on although all of the picture is there: a few bytes of padding before its end (some cameras),
# needless fields of the scan's header, a new JFIF version; and simplejpeg, of chroma subsampled in a rare way.
_HARMLESS = re.compile(
    "data: [1-9] extraneous bytes before marker 0xd9|Invalid SOS parameters|unknown JFIF revision|subsampling level"
)


class RejectedImage(Exception):
    """A source that gives no crops; the message is the reason, one of a few fixed sentences."""


class Stored(NamedTuple):
    """Pixels as stored, uint8 or uint16."""

    colour: np.ndarray  # (H, W) grey, (H, W, 3) RGB, (H, W, 4) amounts of CMYK ink
    alpha: np.ndarray | None  # (H, W), not premultiplied
    orientation: int  # EXIF's, 1 to 8
    profile: bytes | None  # ICC


def decode(data: bytes, name: str = "", alpha: Literal["composite", "reject"] = "composite") -> np.ndarray:
    """Decodes a JPEG, PNG, WebP or TIFF file to uint8 sRGB (height, width, 3), upright by its EXIF orientation.

    16 bits are rounded to 8; an ICC profile is converted from, a broken one ignored as browsers do; the first of
    several pictures (pages, frames, MPO) is taken. `name`: the file's, whose extension must not claim another of the
    four formats. `alpha`: what happens to a picture that is not wholly opaque; it is laid over white, the page it is
    mostly seen on, or rejected. Raises RejectedImage, and nothing else but MemoryError, for whatever else `data` are.
    """
    stored = read_stored(data, name)
    with _told():
        return _finish(stored, alpha)


def read_stored(data: bytes, name: str = "", deep: bool = False, others: bool = False) -> Stored:
    """Reads a JPEG, PNG, WebP or TIFF file as `decode` does, up to its stored pixels.

    `deep`: 16 bits stay 16. `others`: BMP, GIF, PPM, JPEG 2000 and AVIF are read as well. Raises as `decode`.
    """
    if not data:
        raise RejectedImage("empty file")
    format = next((format for format, signature in _SIGNATURES.items() if signature.match(data)), None)
    if format is None and not others:
        raise RejectedImage("not a JPEG, PNG, WebP or TIFF image")
    if format and _EXTENSIONS.get(name.rpartition(".")[2].lower() if "." in name else "", format) != format:
        raise RejectedImage("content does not match the file's extension")
    with _told():
        stored = _read(data, format)
        return stored if deep else _shallow(stored)


@contextmanager
def _told() -> Iterator[None]:
    """Within it, what a library raises becomes the RejectedImage that it means."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on large pictures and odd metadata
            yield
    except (RejectedImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise RejectedImage("not a picture of a known format") from None
    except Image.DecompressionBombError:  # Pillow's own limit, which a program may have set lower
        raise RejectedImage("too many pixels") from None
    except Exception as error:  # the libraries raise OSError, SyntaxError, ValueError, struct.error, cv2.error, ...
        # Pillow stops inflating text and profiles of a PNG at MAX_TEXT_CHUNK and MAX_TEXT_MEMORY, and names them.
        raise RejectedImage("decompression bomb" if "MAX_TEXT_" in str(error) else _BROKEN) from None


def _finish(picture: Stored, alpha: str) -> np.ndarray:
    """uint8 sRGB (H, W, 3), opaque and upright."""
    rgb = to_srgb(picture.colour, picture.profile)
    if picture.alpha is not None and picture.alpha.min() < 255:
        if alpha == "reject":
            raise RejectedImage("has transparency")
        rgb = _over_white(rgb, picture.alpha)
    return upright(rgb, picture.orientation)


def _read(data: bytes, format: str | None) -> Stored:
    if format == "WEBP" and data[12:16] == b"VP8X":  # Pillow would allocate the canvas before it tells the size
        _check_size(int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1)
    if format == "PNG":
        _check_chunks(data)
    image = _opened(data, format)
    _check_size(*image.size)
    profile = image.info.get("icc_profile")
    profile = profile if isinstance(profile, bytes) else None  # a TIFF may call anything its profile
    orientation = _orientation(image)
    if format == "JPEG":
        return Stored(_jpeg(data, image), None, orientation, profile)
    if isinstance(image, TiffImageFile):
        orientation = 1  # both decoders turn the pixels of a TIFF by themselves
        if int(image.tag_v2.get(_SUBFILE_TYPE, 0)) & 1:
            # The first page is a preview: a camera's raw file, whose picture is not pixels yet.
            raise RejectedImage(_UNSUPPORTED)
    colour, alpha = _sixteen_bits(data, image) if _depth(data, image) == 16 else _eight_bits(image)
    return Stored(colour, alpha, orientation, profile)


def _opened(data: bytes, format: str | None) -> Image.Image:
    if format is None:
        return Image.open(io.BytesIO(data), formats=_OTHERS)
    try:
        return Image.open(io.BytesIO(data), formats=(format,))
    except UnidentifiedImageError:  # it begins as that format does
        raise RejectedImage(_BROKEN) from None


def _shallow(stored: Stored) -> Stored:
    if stored.colour.dtype == np.uint8:
        return stored
    alpha = None if stored.alpha is None else _EIGHT_OF_SIXTEEN[stored.alpha]
    return stored._replace(colour=_EIGHT_OF_SIXTEEN[stored.colour], alpha=alpha)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RejectedImage("too many pixels")


def _check_chunks(data: bytes) -> None:
    """Pillow reads pixels past wrong checksums and does not miss the end: a PNG's chunks are checked here.

    Only those that a PNG marks as critical by a capital letter: a damaged comment costs no picture.
    """
    offset, kind = 8, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[offset : offset + 4]), data[offset + 4 : offset + 8]
        end = offset + 8 + length
        if len(data) < end + 4 or (
            kind[:1].isupper() and zlib.crc32(memoryview(data)[offset + 4 : end]) != int.from_bytes(data[end : end + 4])
        ):
            raise RejectedImage(_BROKEN)
        offset = end + 4


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF that can't be read says nothing about the pixels
        return 1


def _depth(data: bytes, image: Image.Image) -> int:
    """Bits of a channel that need more than Pillow's 8: 16, else 8."""
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(_BITS, (1,))
        if max(bits) <= 8:
            return 8
        associated = image.mode == "RGBA" and image.tag_v2.get(_EXTRA_SAMPLES) == (1,)
        planar = len(bits) > 1 and image.tag_v2.get(PLANAR_CONFIGURATION, 1) != 1  # both decoders scramble it
        if set(bits) != {16} or image.mode in ("I", "F") or planar:
            raise RejectedImage(_UNSUPPORTED)
        # Pillow divides by a premultiplied alpha and knows CMYK, OpenCV does neither: there the upper 8 bits must do.
        return 8 if associated or image.mode == "CMYK" else 16
    if image.format in _OTHERS:
        return 16 if image.mode.startswith("I") else 8
    return data[24] if image.format == "PNG" else 8  # of the header chunk, always the first


def _jpeg(data: bytes, image: Image.Image) -> np.ndarray:
    """The hot path, the same pixels as Pillow's and OpenCV's.

    Those two accept a JPEG that ends early or is damaged in the middle as long as an end marker follows, and fill the
    rest with grey; simplejpeg tells.
    """
    if "progressive" in image.info and data.count(b"\xff\xda") > MAX_SCANS:
        raise RejectedImage("decompression bomb")
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)  # as the decoder sees it, which may skip what Pillow took for the header
        target = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(space, "RGB")
        pixels = simplejpeg.decode_jpeg(data, target)
    except ValueError as error:
        if not _HARMLESS.search(str(error)):
            raise
        pixels = np.asarray(image)  # stops where data are missing
        if image.mode == "CMYK":
            pixels = ~pixels  # Pillow takes every CMYK JPEG for Adobe's
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        return pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[2] == 4 and "adobe" in image.info:
        return ~pixels  # Adobe's programs store how much ink is missing
    return pixels


def _sixteen_bits(data: bytes, image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Grey from Pillow; colour from OpenCV, as Pillow has only its upper 8 bits, after Pillow found the file whole."""
    image.load()
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if not 0 <= deep.min() <= deep.max() < 2**16:
            raise RejectedImage(_UNSUPPORTED)
        deep = deep.astype(np.uint16)
        key = image.info.get("transparency")
        alpha = None if key is None else np.where(deep == key, 0, 2**16 - 1).astype(np.uint16)
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:
            deep = ~deep  # stored as negative
        return deep, alpha
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16 or stored.ndim != 3 or stored.shape[1::-1] != image.size:
        raise RejectedImage(_UNSUPPORTED)
    transparent = image.has_transparency_data and stored.shape[2] == 4
    return stored[..., 2::-1], stored[..., 3] if transparent else None


def _eight_bits(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    grey = image.mode in ("1", "L", "LA")
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr"):
        raise RejectedImage(_UNSUPPORTED)
    if image.has_transparency_data:
        rgba = np.asarray(image if image.mode == "RGBA" else image.convert("RGBA"))
        return rgba[..., 0] if grey else rgba[..., :3], rgba[..., 3]
    if image.mode not in ("L", "RGB", "CMYK"):  # Pillow would copy what needs no conversion
        image = image.convert("L" if grey else "RGB")
    return np.asarray(image), None


def to_srgb(colour: np.ndarray, profile: bytes | None) -> np.ndarray:
    """Stored colour of 8 bits as uint8 RGB (H, W, 3), contiguous; a profile that is broken or of other channels is
    ignored."""
    mode = "L" if colour.ndim == 2 else "RGB" if colour.shape[2] == 3 else "CMYK"
    transform = _transform(profile, mode) if profile else None
    if transform is None and mode == "RGB":
        return np.ascontiguousarray(colour)
    rgb = np.empty((*colour.shape[:2], 3), np.uint8)
    rows = max(1, 2**20 // colour.shape[1])  # Pillow's copies of a strip stay small
    for top in range(0, len(colour), rows):
        strip = Image.fromarray(np.ascontiguousarray(colour[top : top + rows]), mode)
        rgb[top : top + rows] = strip.convert("RGB") if transform is None else transform.apply(strip)
    return rgb


@lru_cache(maxsize=16)  # a folder has the profiles of a few cameras and programs
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB, or None if pixels are to stay as they are: sRGB itself, broken, or of other channels.

    Relative colorimetric with black point compensation: a colour that sRGB has stays what it is, and the darkest ink
    is black. (Perceptual tables squeeze every colour, each maker's in its own way, to make room for those it hasn't.)
    """
    try:
        transform = ImageCms.buildTransform(
            ImageCms.getOpenProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    # The profiles named sRGB differ by a level; most pictures have one, and must not pay for a conversion to nothing.
    levels = np.append(np.arange(0, 255, 8), 255).astype(np.uint8)
    lattice = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 33, 3)
    before = Image.fromarray(lattice, mode)
    moved = np.asarray(transform.apply(before)).astype(int) - np.asarray(before.convert("RGB"))
    return None if np.abs(moved).max() <= 1 else transform


def _over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """c * a + white * (1 - a), rounded."""
    opacity = alpha[..., None].astype(np.uint16)
    # At most 255 * 255 + 127, which 16 bits hold.
    return ((rgb * opacity + np.uint16(255) * (255 - opacity) + np.uint16(127)) // np.uint16(255)).astype(np.uint8)


def upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Turned, then mirrored, as EXIF says; other numbers than 1 to 8 say nothing."""
    if orientation in (3, 4):
        rgb = cv2.rotate(rgb, cv2.ROTATE_180)
    elif orientation in (5, 6):
        rgb = cv2.rotate(rgb, cv2.ROTATE_90_CLOCKWISE)
    elif orientation in (7, 8):
        rgb = cv2.rotate(rgb, cv2.ROTATE_90_COUNTERCLOCKWISE)
    return cv2.flip(rgb, 1) if orientation in (2, 4, 5, 7) else rgb
