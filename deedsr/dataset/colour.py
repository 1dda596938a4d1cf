"""Colour spaces of picture files and their conversion to sRGB.

The colour space is an ICC profile, or numbers: chunks of a PNG, tags of a TIFF, EXIF's colour space, code points of an
AVIF. Numbers are turned into a profile, so that there is one conversion, and every format of a result can store them.
"""

import io
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms

# Where a JPEG 2000 has its profile, with the size of the box, and an AVIF its code points: primaries and transfer.
_COLR, _NCLX = (re.compile(p, re.DOTALL) for p in (rb"(....)colr\x02..", rb"colrnclx\0(.)\0(.)"))
_HEAD = 1 << 16  # bytes of a file that hold its header
PNG_CHUNKS = (b"cICP", b"sRGB", b"gAMA", b"cHRM", b"mDCV", b"cLLI")  # that define the colours, besides iCCP


class ColourSpace(NamedTuple):
    """`profile`: ICC profile for the picture's channels, None for sRGB. `chunks`: kind and data of the PNG chunks that
    define the colours.

    `known`: False where neither sRGB nor a profile describes the colours: high dynamic range, or unknown code points.
    """

    profile: bytes | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    known: bool = True


def space_of(
    data: bytes, image: Image.Image, exif: Image.Exif, chunks: Mapping[bytes, bytes], model: str
) -> ColourSpace:
    """The colour space of an opened file. `model`: of its channels, GRAY, RGB or CMYK; `chunks`: of a PNG."""
    embedded = _embedded(data, image)
    profile = embedded if embedded and _describes(embedded, model) else None
    if model == "CMYK":
        return ColourSpace(profile)
    own = tuple((kind, chunks[kind]) for kind in PNG_CHUNKS if kind in chunks)
    code_points = chunks.get(b"cICP")
    if profile is None and image.format == "AVIF" and (nclx := _NCLX.search(data, 0, _HEAD)):
        code_points = nclx[1] + nclx[2] + b"\0\1"
    if code_points:
        try:
            return ColourSpace(_of_code_points(code_points, model), own)
        except ValueError:
            return ColourSpace(None, own or ((b"cICP", code_points),), known=False)
    if profile is None and b"sRGB" not in chunks:
        try:
            profile = _of_numbers(image, exif, chunks, model)
        except (ValueError, TypeError, ArithmeticError, struct.error):  # invalid numbers are ignored
            profile = None
    return ColourSpace(profile, own)


def _embedded(data: bytes, image: Image.Image) -> bytes | None:
    """The ICC profile embedded in a file; Pillow does not read it in every format."""
    if image.format == "BMP" and data[14:18] == struct.pack("<I", 124) and data[70:74] == b"DEBM":
        start, size = struct.unpack_from("<II", data, 126)
        return data[14 + start : 14 + start + size]
    if image.format == "JPEG2000" and (box := _COLR.search(data, 0, _HEAD)):
        return data[box.end() : box.start() + int.from_bytes(box[1])]
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) else None  # a TIFF may call anything its profile


@lru_cache(maxsize=16)
def _describes(profile: bytes, model: str) -> bool:
    """Whether a profile is valid and for these channels."""
    try:
        return ImageCms.getOpenProfile(io.BytesIO(profile)).profile.xcolor_space.strip() == model
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return False


# Numbers to a profile

_SRGB = [Fraction(n) for n in ("0.3127", "0.3290", "0.64", "0.33", "0.30", "0.60", "0.15", "0.06")]
_ADOBE_RGB = [*_SRGB[:4], Fraction("0.21"), Fraction("0.71"), *_SRGB[6:]]
_ADOBE_GAMMA = Fraction(563, 256)
_ENOUGH = Fraction(1, 200)  # chromaticities and exponents that differ by less are taken for equal
_EXPONENTS = (Fraction(1, 10), Fraction(10))

# ITU-T H.273. Video's curves are taken for sRGB's, as browsers do.
_PRIMARIES = {
    1: _SRGB,
    2: _SRGB,  # unspecified
    4: [Fraction(n) for n in ("0.310", "0.316", "0.67", "0.33", "0.21", "0.71", "0.14", "0.08")],
    5: [*_SRGB[:4], *(Fraction(n) for n in ("0.29", "0.60", "0.15", "0.06"))],
    6: [*_SRGB[:2], *(Fraction(n) for n in ("0.630", "0.340", "0.310", "0.595", "0.155", "0.070"))],
    9: [*_SRGB[:2], *(Fraction(n) for n in ("0.708", "0.292", "0.170", "0.797", "0.131", "0.046"))],
    11: [Fraction(n) for n in ("0.314", "0.351", "0.680", "0.320", "0.265", "0.690", "0.150", "0.060")],
    12: [*_SRGB[:2], *(Fraction(n) for n in ("0.680", "0.320", "0.265", "0.690", "0.150", "0.060"))],
}
_PRIMARIES[7] = _PRIMARIES[6]
_EXPONENT_OF: dict[int, Fraction | None] = {4: Fraction("2.2"), 5: Fraction("2.8"), 8: Fraction(1)}
_EXPONENT_OF |= dict.fromkeys((1, 2, 6, 13, 14, 15))


def _of_code_points(cicp: bytes, model: str) -> bytes | None:
    """Raises ValueError for high dynamic range, for unknown code points and for anything but full-range RGB."""
    primaries, transfer, matrix, full_range = cicp
    if matrix or full_range != 1 or primaries not in _PRIMARIES or transfer not in _EXPONENT_OF:
        raise ValueError(cicp)
    return _profile(_PRIMARIES[primaries], _EXPONENT_OF[transfer], model)


def _of_numbers(image: Image.Image, exif: Image.Exif, chunks: Mapping[bytes, bytes], model: str) -> bytes | None:
    if image.format == "PNG":
        if not {b"gAMA", b"cHRM"} & chunks.keys():
            return None
        numbers = struct.unpack(">8I", chunks[b"cHRM"]) if b"cHRM" in chunks else ()
        exponent = Fraction(10**5, *struct.unpack(">I", chunks[b"gAMA"])) if b"gAMA" in chunks else None
        return _profile([Fraction(n, 10**5) for n in numbers] or _SRGB, exponent, model)
    if image.format in ("JPEG", "MPO", "TIFF"):  # in other formats EXIF may describe the file they were converted from
        return _of_exif(exif, model)
    return None


def _of_exif(exif: Image.Exif, model: str) -> bytes | None:
    details = exif.get_ifd(ExifTags.IFD.Exif)
    declared = details.get(ExifTags.Base.ColorSpace)
    if declared == 1:
        return None
    try:
        adobe = declared == 2 or exif.get_ifd(ExifTags.IFD.Interop).get(1) == "R03"  # what cameras call Adobe RGB
    except KeyError:  # Pillow below 13, of a file without that part
        adobe = False
    if adobe:
        return _profile(_ADOBE_RGB, _ADOBE_GAMMA, model)
    white, primaries, table = (
        exif.get(tag)
        for tag in (ExifTags.Base.WhitePoint, ExifTags.Base.PrimaryChromaticities, ExifTags.Base.TransferFunction)
    )
    if not primaries and not table:
        return None
    numbers = [Fraction(float(n)).limit_denominator(10**5) for n in (*(white or _SRGB[:2]), *(primaries or _SRGB[2:]))]
    gamma = details.get(ExifTags.Base.Gamma)
    exponent = Fraction(float(gamma)).limit_denominator(1000) if gamma else None
    return _profile(numbers, exponent, model, table or ())


def _profile(
    numbers: Sequence[Fraction], exponent: Fraction | None, model: str, table: Sequence[int] = ()
) -> bytes | None:
    """`numbers`: x and y of white, red, green and blue. `exponent`: None for sRGB's curve. None where it is sRGB."""
    if len(numbers) != 8 or (exponent is not None and not _EXPONENTS[0] <= exponent <= _EXPONENTS[1]):
        raise ValueError("not the numbers of a colour space")
    # light = value ** exponent
    curves = [_SRGB_CURVE if exponent is None else b"para" + bytes(8) + _fixed([exponent])] * 3
    if table:
        parts = 3 if len(table) % 3 == 0 else 1
        size = len(table) // parts  # light / 65535 at so many evenly spaced values
        packed = [struct.pack(f">I{size}H", size, *table[part * size : (part + 1) * size]) for part in range(parts)]
        curves = [b"curv\0\0\0\0" + light for light in packed] * (3 // parts)
    plain = not table and (exponent is None or _alike(exponent, Fraction("2.2")))
    if plain and (model == "GRAY" or all(map(_alike, numbers, _SRGB))):
        return None
    if model == "GRAY":
        return _icc(b"GRAY", {b"wtpt": _xyz(_D50), b"kTRC": curves[0]})
    return rgb_profile(numbers, curves)


def _alike(number: Fraction, other: Fraction) -> bool:
    return abs(number - other) < _ENOUGH * max(Fraction(1), other)


# A profile to sRGB


def to_srgb(colour: np.ndarray, profile: bytes | None) -> np.ndarray:
    """Stored colour, uint8 or uint16, as uint8 RGB (H, W, 3), contiguous.

    A profile that is broken or of other channels is ignored. A 16-bit value is interpolated between the conversions of
    its two 8-bit neighbours: rounding first would leave a few steps in the shadows of a linear picture.
    """
    mode = "L" if colour.ndim == 2 else "RGB" if colour.shape[2] == 3 else "CMYK"
    transform = _transform(profile, mode) if profile else None
    if colour.dtype == np.uint16 and transform is None:
        colour = shallow(colour)
    if transform is None and mode == "RGB":
        return np.ascontiguousarray(colour)
    rgb = np.empty((*colour.shape[:2], 3), np.uint8)
    rows = max(1, 2**20 // colour.shape[1])  # Pillow's copies of a strip stay small
    for top in range(0, len(colour), rows):
        strip = np.ascontiguousarray(colour[top : top + rows])
        if strip.dtype == np.uint16:
            rgb[top : top + rows] = _between(strip, mode, transform)
        else:
            rgb[top : top + rows] = _converted(strip, mode, transform)
    return rgb


def shallow(deep: np.ndarray) -> np.ndarray:
    """16 bits to 8: 65535 / 257 = 255, rounded."""
    return _EIGHT_OF_SIXTEEN[deep]


_EIGHT_OF_SIXTEEN = ((np.arange(2**16) + 128) // 257).astype(np.uint8)


def _converted(strip: np.ndarray, mode: str, transform: ImageCms.ImageCmsTransform | None) -> np.ndarray:
    image = Image.fromarray(strip, mode)
    return np.asarray(image.convert("RGB") if transform is None else transform.apply(image))


def _between(strip: np.ndarray, mode: str, transform: ImageCms.ImageCmsTransform | None) -> np.ndarray:
    below = (strip // 257).astype(np.uint8)
    share = (strip % 257).astype(np.uint32)  # of the way to the next level, of 257
    if share.ndim == 2:
        share = share[..., None]
    low = _converted(below, mode, transform)
    high = _converted(below + (below < 255), mode, transform)
    return ((low * (257 - share) + high * share + 128) // 257).astype(np.uint8)


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
    # The profiles named sRGB differ by a level; most pictures have one, and should not be converted without effect.
    levels = np.append(np.arange(0, 255, 8), 255).astype(np.uint8)
    lattice = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 33, 3)
    before = Image.fromarray(lattice, mode)
    moved = np.asarray(transform.apply(before)).astype(int) - np.asarray(before.convert("RGB"))
    return None if np.abs(moved).max() <= 1 else transform


# ICC profiles of white point, primaries and transfer curve. They are computed in exact fractions up to the last
# rounding, so that equal numbers give equal bytes on every processor.

_D50 = np.array([Fraction(0xF6D6, 65536), Fraction(1), Fraction(0xD32D, 65536)])  # as ICC rounds it
_BRADFORD = np.array([[8951, 2664, -1614], [-7502, 17135, 367], [389, -685, 10296]]) * Fraction(1, 10**4)

# IEC 61966-2-1: ((value + 0.055) / 1.055) ** 2.4 above 0.04045, else value / 12.92
_SRGB_CURVE = (
    b"para\0\0\0\0\0\3\0\0"
    + struct.pack(">i", round(Fraction("2.4") * 65536))
    + struct.pack(">4i", *(round(Fraction(n) * 65536) for n in ("1000/1055", "55/1055", "100/1292", "0.04045")))
)


def rgb_profile(numbers: Sequence[Fraction], curves: Sequence[bytes]) -> bytes:
    """`numbers`: x and y of white, red, green and blue. Raises ValueError for numbers that span no colours."""
    x, y = np.array(numbers).reshape(4, 2).T
    if not all(y):
        raise ValueError("a chromaticity without luminance")
    light, *primaries = np.stack([x / y, y / y, (1 - x - y) / y], axis=1)  # XYZ of luminance 1
    columns = np.stack(primaries, axis=1)
    amounts = _inverse(columns) @ light
    cones, cones_d50 = _BRADFORD @ light, _BRADFORD @ _D50
    if not all(cones) or not all(amounts):
        raise ValueError("no white of these primaries")
    adaptation = _inverse(_BRADFORD) @ (_BRADFORD * (cones_d50 / cones)[:, None])
    colorants = (adaptation @ columns * amounts).T
    tags = {b"wtpt": _xyz(_D50), b"chad": b"sf32\0\0\0\0" + _fixed(adaptation.ravel())}
    for name, colorant, curve in zip(b"rgb", colorants, curves, strict=True):
        tags[bytes([name]) + b"XYZ"] = _xyz(colorant)
        tags[bytes([name]) + b"TRC"] = curve
    return _icc(b"RGB ", tags)


def _icc(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": _text("Colours of the original"), b"cprt": _text("No copyright, use freely")} | tags
    places: dict[bytes, int] = {}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        if value not in places:  # equal curves are stored once
            places[value] = start + len(body)
            body += value + bytes(-len(value) % 4)
        table += name + struct.pack(">II", places[value], len(value))
    date = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    head = struct.pack(">I4xI", start + len(body), 0x04200000) + b"mntr" + space + b"XYZ " + date + b"acsp"
    return (head.ljust(68, b"\0") + _fixed(_D50)).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II4sII", 1, 12, b"enUS", len(encoded), 28) + encoded


def _xyz(vector: Iterable[Fraction]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(vector)


def _fixed(numbers: Iterable[Fraction]) -> bytes:
    rounded = [round(number * 65536) for number in numbers]
    try:
        return struct.pack(f">{len(rounded)}i", *rounded)
    except struct.error:
        raise ValueError("numbers too large for a profile") from None


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Of three rows of fractions, by their cross products."""
    a, b, c = matrix
    volume = a @ np.cross(b, c)
    if not volume:
        raise ValueError("primaries on one line")
    return np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=1) / volume
