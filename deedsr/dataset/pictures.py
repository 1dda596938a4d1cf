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
from typing import Literal, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import PLANAR_CONFIGURATION, TiffImageFile

from deedsr.dataset.colour import PNG_CHUNKS, ColourSpace, shallow, space_of, to_srgb

MAX_PIXELS = 2**29 // 3  # 179 megapixels: 512 MiB as RGB; read from the header, before memory is allocated
MAX_SCANS = 200  # of a JPEG; a progressive one has about ten. Each pass over an empty scan costs as much as a full one

_SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
}
_OTHERS = ("BMP", "GIF", "PPM", "JPEG2000", "AVIF")  # of Pillow; none that calls another program, as EPS does
_EXTENSIONS = dict.fromkeys(("jpg", "jpeg", "jpe", "jfif"), "JPEG") | dict.fromkeys(("tif", "tiff"), "TIFF")
_EXTENSIONS |= {"png": "PNG", "webp": "WEBP"}
_SUBFILE_TYPE, _BITS, _PHOTOMETRIC, _EXTRA_SAMPLES = 254, 258, 262, 338  # TIFF's tags
_MARKER = re.compile(rb"\xff([^\0\xd0-\xd7\xff])")  # of JPEG; in a scan, 0 is a stuffed byte and the others restarts

_BROKEN = "truncated or broken image"
_UNSUPPORTED = "unsupported pixel format"

# Warnings of libjpeg about complete pictures: a few bytes of padding before its end (some cameras),
# needless fields of the scan's header, a new JFIF version; and simplejpeg, of chroma subsampled in a rare way.
_HARMLESS = re.compile(
    "data: [1-9] extraneous bytes before marker 0xd9|Invalid SOS parameters|unknown JFIF revision|subsampling level"
)


class RejectedImage(Exception):
    """A source that gives no crops; the message is the reason, one of a few fixed sentences."""


class Stored(NamedTuple):
    """Pixels as stored, uint8 or uint16, with colour space and EXIF."""

    colour: np.ndarray  # (H, W) grey, (H, W, 3) RGB, (H, W, 4) amounts of CMYK ink
    alpha: np.ndarray | None  # (H, W), not premultiplied
    space: ColourSpace
    orientation: int  # EXIF's, 1 to 8
    exif: Image.Exif  # empty where it cannot be read


def decode(data: bytes, name: str = "", alpha: Literal["composite", "reject"] = "composite") -> np.ndarray:
    """Decodes a JPEG, PNG, WebP or TIFF file to uint8 sRGB (height, width, 3), upright by its EXIF orientation.

    16 bits become 8. The colour space of the file (`colour.py`) is converted to sRGB; a broken profile is ignored as
    browsers do. The first of several pictures (pages, frames, MPO) is taken. `name`: the file's, whose extension must
    not claim another of the four formats. `alpha`: what happens to a picture that is not wholly opaque; it is laid over
    white or rejected. Raises RejectedImage for any other data, and no other exception but MemoryError.
    """
    stored = read_stored(data, name)
    if not stored.space.known:
        raise RejectedImage("unsupported colour space")
    with _rejecting():
        rgb = to_srgb(stored.colour, stored.space.profile)
        if stored.alpha is not None:
            opacity = stored.alpha if stored.alpha.dtype == np.uint8 else shallow(stored.alpha)
            if opacity.min() < 255:
                if alpha == "reject":
                    raise RejectedImage("has transparency")
                rgb = _over_white(rgb, opacity)
        return upright(rgb, stored.orientation)


def read_stored(data: bytes, name: str = "", others: bool = False) -> Stored:
    """Reads a JPEG, PNG, WebP or TIFF file as `decode` does, up to its stored pixels.

    `others`: BMP, GIF, PPM, JPEG 2000 and AVIF are read as well. Raises as `decode`.
    """
    if not data:
        raise RejectedImage("empty file")
    format = next((format for format, signature in _SIGNATURES.items() if signature.match(data)), None)
    if format is None and not others:
        raise RejectedImage("not a JPEG, PNG, WebP or TIFF image")
    if format and _EXTENSIONS.get(name.rpartition(".")[2].lower() if "." in name else "", format) != format:
        raise RejectedImage("content does not match the file's extension")
    with _rejecting():
        return _read(data, format)


@contextmanager
def _rejecting() -> Iterator[None]:
    """Translates exceptions of the libraries into RejectedImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about large pictures and odd metadata
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


def _read(data: bytes, format: str | None) -> Stored:
    if format == "WEBP" and data[12:16] == b"VP8X":  # Pillow would allocate the canvas before it reports the size
        _check_size(int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1)
    chunks = _chunks(data) if format == "PNG" else {}
    image = _opened(data, format)
    _check_size(*image.size)
    exif = _exif(image)
    orientation = int(exif.get(ExifTags.Base.Orientation, 1))
    if format == "PNG" and image.mode == "L" and isinstance(key := image.info.get("transparency"), int):
        highest = 2 ** data[24] - 1  # of the file's 2, 4 or 8 bits: Pillow brings the pixels to 8, and not this level
        image.info["transparency"] = (key & highest) * (255 // highest)
    if format == "JPEG":
        colour, alpha = _jpeg(data, image), None
    else:
        if isinstance(image, TiffImageFile):
            orientation = 1  # both decoders turn the pixels of a TIFF by themselves
            if int(image.tag_v2.get(_SUBFILE_TYPE, 0)) & 1:
                # The first page is a preview: a camera's raw file, whose picture is not pixels yet.
                raise RejectedImage(_UNSUPPORTED)
        colour, alpha = _sixteen_bits(data, image) if _depth(data, image) == 16 else _eight_bits(image)
    model = "GRAY" if colour.ndim == 2 else "RGB" if colour.shape[2] == 3 else "CMYK"
    return Stored(colour, alpha, space_of(data, image, exif, chunks, model), orientation, exif)


def _opened(data: bytes, format: str | None) -> ImageFile.ImageFile:
    if format is None:
        return Image.open(io.BytesIO(data), formats=_OTHERS)
    try:
        return Image.open(io.BytesIO(data), formats=(format,))
    except UnidentifiedImageError:  # it begins as that format does
        raise RejectedImage(_UNSUPPORTED if format == "TIFF" and _is_unknown_tiff(data) else _BROKEN) from None


def _is_unknown_tiff(data: bytes) -> bool:
    """Whether Pillow reads the header but lacks the pixel mode: 16-bit grey with alpha, a mask, five channels."""
    try:
        TiffImageFile(io.BytesIO(data))
    except SyntaxError as error:
        return "unknown pixel mode" in str(error)
    return False


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RejectedImage("too many pixels")


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG that define its colours, by kind.

    Pillow reads pixels past wrong checksums and does not miss the end: a PNG's chunks are checked here. Only those that
    a PNG marks as critical by a capital letter: a damaged comment costs no picture.
    """
    found: dict[bytes, bytes] = {}
    offset, kind = 8, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[offset : offset + 4]), data[offset + 4 : offset + 8]
        end = offset + 8 + length
        if len(data) < end + 4 or (
            kind[:1].isupper() and zlib.crc32(memoryview(data)[offset + 4 : end]) != int.from_bytes(data[end : end + 4])
        ):
            raise RejectedImage(_BROKEN)
        if kind in PNG_CHUNKS:
            found.setdefault(kind, data[offset + 8 : end])
        offset = end + 4
    return found


def _exif(image: ImageFile.ImageFile) -> Image.Exif:
    try:
        exif = image.getexif()
        int(exif.get(ExifTags.Base.Orientation, 1))
        return exif
    except Exception:  # struct.error, SyntaxError, ValueError, KeyError ...: EXIF that cannot be read is ignored
        return Image.Exif()


def _depth(data: bytes, image: ImageFile.ImageFile) -> int:
    """Bits of a channel that need more than Pillow's 8: 16, else 8."""
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(_BITS, (1,))
        if max(bits) <= 8:
            return 8
        planar = len(bits) > 1 and image.tag_v2.get(PLANAR_CONFIGURATION, 1) != 1  # both decoders scramble it
        if set(bits) != {16} or image.mode in ("I", "F") or planar:
            raise RejectedImage(_UNSUPPORTED)
        return 8 if image.mode == "CMYK" else 16  # OpenCV cannot read it: the upper 8 bits are used
    if image.format == "PNG":
        return data[24]  # of the header chunk, always the first
    if image.format in ("PPM", "JPEG2000") and image.mode == "RGB":
        return 16 if _highest(data, image) > 255 else 8
    return 16 if image.mode.startswith("I") else 8


def _highest(data: bytes, image: ImageFile.ImageFile) -> int:
    """The highest value that the numbers of a PPM or JPEG 2000 can have."""
    if image.format == "PPM":
        arguments = image.tile[0][3]
        return int(arguments[1]) if isinstance(arguments, tuple) and len(arguments) > 1 else 255
    size = data.index(b"\xff\x4f\xff\x51")  # begin of the code stream
    return int(2 ** ((data[size + 42] & 127) + 1) - 1)


def _jpeg(data: bytes, image: ImageFile.ImageFile) -> np.ndarray:
    """Decodes a JPEG by simplejpeg, to the same pixels as Pillow and OpenCV.

    Those two accept a JPEG that ends early or is damaged in the middle as long as an end marker follows, and fill the
    rest with grey; simplejpeg reports it.
    """
    if _scans(data) > MAX_SCANS:
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


def _scans(data: bytes) -> int:
    """Scans of a JPEG up to its end; behind it, phones put a video or a second picture."""
    scans, offset = 0, 2
    while (found := _MARKER.search(data, offset)) and (marker := found[1][0]) != 0xD9:
        scans += marker == 0xDA
        segment = found.end()
        offset = segment + (int.from_bytes(data[segment : segment + 2]) if marker not in (0x01, 0xD8) else 0)
    return scans


def _sixteen_bits(data: bytes, image: ImageFile.ImageFile) -> tuple[np.ndarray, np.ndarray | None]:
    """Grey from Pillow; colour from OpenCV, as Pillow has only its upper 8 bits, after Pillow found the file whole."""
    highest = _highest(data, image) if image.format in ("PPM", "JPEG2000") else 65535
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
        if image.format in _OTHERS:  # OpenCV has not all of their variants
            return _eight_bits(image)
        raise RejectedImage(_UNSUPPORTED)
    if highest < 65535:
        stored = ((stored.astype(np.uint32) * 65535 + highest // 2) // highest).astype(np.uint16)
    transparent = image.has_transparency_data and stored.shape[2] == 4
    # OpenCV has colours for grey with alpha: 4 is the colour type of that in a PNG's header.
    colour = stored[..., 0] if image.format == "PNG" and data[25] == 4 else stored[..., 2::-1]
    if not transparent:
        return colour, None
    alpha = stored[..., 3]
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_EXTRA_SAMPLES) == (1,):  # premultiplied
        light = colour.astype(np.uint32) * 65535 + alpha[..., None] // 2
        colour = (light // np.maximum(alpha, 1)[..., None]).clip(max=65535).astype(np.uint16)
    return colour, alpha


def _eight_bits(image: ImageFile.ImageFile) -> tuple[np.ndarray, np.ndarray | None]:
    grey = image.mode in ("1", "L", "LA")
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr"):
        raise RejectedImage(_UNSUPPORTED)
    if image.has_transparency_data:
        rgba = np.asarray(image if image.mode == "RGBA" else image.convert("RGBA"))
        return rgba[..., 0] if grey else rgba[..., :3], rgba[..., 3]
    if image.mode in ("L", "RGB", "CMYK"):  # Pillow would copy what needs no conversion
        return np.asarray(image), None
    return np.asarray(image.convert("L" if grey else "RGB")), None


def _over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """c * a + white * (1 - a), rounded."""
    opacity = alpha[..., None].astype(np.uint16)
    # At most 255 * 255 + 127, which 16 bits hold.
    return ((rgb * opacity + np.uint16(255) * (255 - opacity) + np.uint16(127)) // np.uint16(255)).astype(np.uint8)


def upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Turned, then mirrored, as EXIF says; other numbers are ignored."""
    turns = dict.fromkeys((3, 4), cv2.ROTATE_180) | dict.fromkeys((5, 6), cv2.ROTATE_90_CLOCKWISE)
    turns |= dict.fromkeys((7, 8), cv2.ROTATE_90_COUNTERCLOCKWISE)
    rgb = cv2.rotate(rgb, turns[orientation]) if orientation in turns else rgb
    return cv2.flip(rgb, 1) if orientation in (2, 4, 5, 7) else rgb
