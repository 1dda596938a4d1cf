"""Picture files: pixels upright, what the networks do not see of them, and results with equal bytes for equal pictures.

EXIF of results is what the camera wrote, made true for the larger picture, and a mark of what the result is made of:
ImageUniqueID, 32 hexadecimal digits, beside Software = "DeeDSR ...". It travels with the file, so that no other file
has to say which results are done.

Array shapes: H W pixels, C channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
"""

import io
import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO, Literal, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from deedsr import __version__
from deedsr.dataset.colour import ColourSpace, to_srgb
from deedsr.dataset.pictures import MAX_PIXELS, RejectedImage, read_stored, upright
from deedsr.errors import DeeDSRError

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]  # of grey in RGB, as everywhere in Pillow
_HINTS = {
    "too many pixels": f" (the limit is {MAX_PIXELS // 10**6} million): cut it into parts",
    "unsupported pixel format": ": convert it to 8 or 16 bits, grey or RGB, first",
}


class Picture(NamedTuple):
    pixels_HWC: np.ndarray  # uint8 or uint16
    space: ColourSpace
    exif: Image.Exif

    @property
    def deep(self) -> bool:
        return self.pixels_HWC.dtype == np.uint16

    @property
    def grey(self) -> bool:
        return self.pixels_HWC.shape[2] <= 2

    @property
    def alpha(self) -> np.ndarray | None:
        """(H, W)"""
        return None if self.pixels_HWC.shape[2] % 2 else self.pixels_HWC[..., -1]

    @property
    def opaque(self) -> bool:
        return self.alpha is None or bool((self.alpha == depth_of(self.pixels_HWC)).all())

    @property
    def neutral(self) -> bool:
        """Whether it is grey, also where it is stored as RGB: the channels of every visible pixel are equal.

        Up to one 8-bit level, the error of grey that was compressed as WebP.
        """
        if self.grey:
            return True
        colour_HWC, alpha = self.pixels_HWC[..., :3], self.alpha
        lowest, highest = colour_HWC.min(-1), colour_HWC.max(-1)
        tinted = highest - lowest > (257 if self.deep else 1)
        return not (tinted if alpha is None else tinted & (alpha > 0)).any()

    def rgb(self) -> np.ndarray:
        """float32 (3, H, W) in [0, 1], the input of the networks.

        A wholly transparent pixel takes the colour of the nearest visible one: its own would tint the edge.
        """
        colour = self.pixels_HWC[..., :1] if self.grey else self.pixels_HWC[..., :3]
        if self.alpha is not None:
            colour = _bled(colour, self.alpha)
        scaled = colour.astype(np.float32) / np.float32(depth_of(colour))
        return np.ascontiguousarray(np.broadcast_to(scaled, (*scaled.shape[:2], 3)).transpose(2, 0, 1))

    def enlarged(self, rgb_CHW: np.ndarray, deep: bool) -> "Picture":
        """The same picture with its larger colours, float in [0, 1]; grey and transparency as they were.

        `deep`: 16 bits, else 8. Transparency is enlarged bicubically.
        """
        channels = [(rgb_CHW * _LUMA).sum(0)] * (1 if self.grey else 3) if self.neutral else [*rgb_CHW]
        if self.alpha is not None:
            size = rgb_CHW.shape[:0:-1]
            alpha = Image.fromarray(self.alpha.astype(np.float32) / np.float32(depth_of(self.alpha)))
            channels.append(np.asarray(alpha.resize(size, Image.Resampling.BICUBIC)))
        dtype = np.uint16 if deep else np.uint8
        highest = np.float32(np.iinfo(dtype).max)
        pixels_HWC = np.stack([np.rint(x.clip(0, 1) * highest).astype(dtype) for x in channels], -1)
        return self._replace(pixels_HWC=pixels_HWC)


def depth_of(pixels: np.ndarray) -> int:
    """The highest value that these integers can have: 255 or 65535."""
    return int(np.iinfo(pixels.dtype).max)


def read_picture(data: bytes) -> Picture:
    """A picture file's first frame, upright. CMYK becomes sRGB. Raises DeeDSRError saying what is wrong with it."""
    try:
        stored = read_stored(data, others=True)
    except RejectedImage as rejection:
        raise DeeDSRError(f"{rejection}{_HINTS.get(str(rejection), '')}") from None
    except MemoryError:
        raise DeeDSRError("not enough memory to decode it: cut it into parts") from None
    colour, space = stored.colour, stored.space
    if colour.ndim == 3 and colour.shape[2] == 4:
        colour, space = to_srgb(colour, space.profile), ColourSpace()
    channels = [np.atleast_3d(colour)]
    if stored.alpha is not None:
        channels.append(stored.alpha[..., None])
    pixels_HWC = upright(np.ascontiguousarray(np.concatenate(channels, -1)), stored.orientation)
    return Picture(np.atleast_3d(pixels_HWC), space, stored.exif)  # OpenCV drops a single channel


def _bled(colour_HWC: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours, with wholly transparent pixels filled from the nearest visible one."""
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return colour_HWC
    _, nearest = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    by_label = np.empty((nearest.max() + 1, colour_HWC.shape[2]), colour_HWC.dtype)
    by_label[nearest[~hidden]] = colour_HWC[~hidden]
    return by_label[nearest]


Format = Literal["png", "jpeg", "webp", "same"]
EXTENSIONS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "jpe": "jpeg", "jfif": "jpeg", "webp": "webp"}
LOSSY = ("jpeg", "webp")
_LARGEST_SIDE = {"png": 2**31 - 1, "jpeg": 65500, "webp": 16383}  # pixels, of the libraries
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def format_of(path: str) -> str:
    """`png`, `jpeg` or `webp`, by the extension of a result."""
    return EXTENSIONS[path.rpartition(".")[2].lower()]


def require_fit(picture: Picture, format: str, side: int) -> None:
    """Raises DeeDSRError before the work where the format could not hold the result, `side` pixels on the longer."""
    if format == "jpeg" and not picture.opaque:
        raise DeeDSRError("it has transparency, which JPEG cannot keep: choose --format png or webp")
    if format != "png" and not picture.space.known:
        raise DeeDSRError(f"no ICC profile describes its colours, and {format} stores only those: choose --format png")
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


_SOFTWARE = "DeeDSR"
_LONGEST = 65_000  # bytes; JPEG has room for 65,533
_ORIENTATION, _SOFTWARE_TAG = ExifTags.Base.Orientation, ExifTags.Base.Software
_UNIQUE_ID, _MAKER_NOTE = ExifTags.Base.ImageUniqueID, ExifTags.Base.MakerNote
_WIDTH, _HEIGHT = ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight
_DIRECTORIES = {directory.value for directory in ExifTags.IFD}
# How a TIFF stores its pixels, and where; of no other file. IFD1, with the thumbnail, is never written by Pillow.
_STRUCTURE = {
    *(254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291),
    *(292, 293, 301, 317, 318, 319, 320, 321, 322, 323, 324, 325, 330, 332, 333, 334, 336, 337, 338, 339, 340, 341),
    *(342, 343, 344, 345, 346, 347, 351, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
    *(700, 33723, 34377, 34675, 37724, 50706, 50707),  # XMP, IPTC, Photoshop's, ICC, DNG's version
}


def exif_of_result(exif: Image.Exif, width: int, height: int, mark: str) -> bytes:
    """What PNG's eXIf chunk holds: the original's EXIF without orientation and thumbnail, with the new size.

    An original's EXIF that cannot be written again is left out, its maker note where there is no room for it.
    """
    for original, without in ((exif, None), (exif, _MAKER_NOTE), (Image.Exif(), None)):
        written = _written(original, width, height, mark, without)
        if written is not None and len(written) <= _LONGEST:
            return written
    raise AssertionError("the mark and the size fit")


def _written(original: Image.Exif, width: int, height: int, mark: str, without: int | None) -> bytes | None:
    try:
        exif = Image.Exif()
        exif.endian = original.endian or "<"
        for tag, value in original.items():
            if tag not in _STRUCTURE | _DIRECTORIES:
                exif[tag] = value
        details = {tag: value for tag, value in original.get_ifd(ExifTags.IFD.Exif).items() if tag != without}
        if ExifTags.IFD.Interop in details:
            details[ExifTags.IFD.Interop] = dict(original.get_ifd(ExifTags.IFD.Interop))
        details |= {_WIDTH: width, _HEIGHT: height, _UNIQUE_ID: mark}
        exif[ExifTags.IFD.Exif] = details
        if place := original.get_ifd(ExifTags.IFD.GPSInfo):
            exif[ExifTags.IFD.GPSInfo] = dict(place)
        exif.pop(_ORIENTATION, None)
        exif[_SOFTWARE_TAG] = f"{_SOFTWARE} {__version__}"
        return exif.tobytes().removeprefix(b"Exif\0\0")
    except Exception:  # values that fit no EXIF type: struct.error, TypeError, ValueError, KeyError, OverflowError ...
        return None


def mark_of(file: BinaryIO, format: str) -> str | None:
    """The mark of a result, None for a picture of another program and for what is no such file."""
    kinds: dict[str, type[ImageFile.ImageFile]] = {"png": PngImageFile, "jpeg": JpegImageFile, "webp": WebPImageFile}
    try:
        exif = kinds[format](file).getexif()  # not by Image.open, which refuses to open results of many pixels
        software = exif.get(_SOFTWARE_TAG)
        if not isinstance(software, str) or not software.startswith(_SOFTWARE):
            return None
        return str(exif.get_ifd(ExifTags.IFD.Exif).get(_UNIQUE_ID, ""))
    except Exception:  # whatever lies there
        return None
