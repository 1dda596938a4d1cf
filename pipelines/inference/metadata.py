"""EXIF of results: what the camera wrote, made true for the larger picture, and a mark of what the result is made of.

The mark is EXIF's ImageUniqueID, 32 hexadecimal digits, beside Software = "DeeDSR ...": it travels with the file, so
that no other file has to say which results are done.
"""

from typing import Any, BinaryIO

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from deedsr import __version__

__all__ = ["exif_of_result", "mark_of"]

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
    with_maker_note = _written(exif, width, height, mark, without=())
    if with_maker_note is not None and len(with_maker_note) <= _LONGEST:
        return with_maker_note
    smaller = _written(exif, width, height, mark, without=(_MAKER_NOTE,))
    if smaller is not None and len(smaller) <= _LONGEST:
        return smaller
    alone = _written(Image.Exif(), width, height, mark, without=())
    assert alone is not None
    return alone


def _written(original: Image.Exif, width: int, height: int, mark: str, without: tuple[int, ...]) -> bytes | None:
    try:
        exif = Image.Exif()
        exif.endian = original.endian or "<"
        for tag, value in original.items():
            if tag not in _STRUCTURE | _DIRECTORIES:
                exif[tag] = value
        details = {tag: value for tag, value in original.get_ifd(ExifTags.IFD.Exif).items() if tag not in without}
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
    kinds: dict[str, Any] = {"png": PngImageFile, "jpeg": JpegImageFile, "webp": WebPImageFile}
    try:
        exif = kinds[format](file).getexif()  # not by Image.open, which refuses to open results of many pixels
        software = exif.get(_SOFTWARE_TAG)
        if not isinstance(software, str) or not software.startswith(_SOFTWARE):
            return None
        return str(exif.get_ifd(ExifTags.IFD.Exif).get(_UNIQUE_ID, ""))
    except Exception:  # whatever lies there
        return None
