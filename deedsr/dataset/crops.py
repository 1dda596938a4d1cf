"""From the bytes of a source to the crops that become HR images."""

import io
import warnings
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deedsr.degradation.recipe import Crop

__all__ = ["CropPlace", "RejectedImage", "choose_crops", "cut", "decode"]

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


class RejectedImage(Exception):
    """A source that gives no crops; the message is the reason, one of a few fixed sentences."""


class CropPlace(NamedTuple):
    """A square of the source, in pixels of the source as seen (EXIF orientation applied)."""

    top: int
    left: int
    size: int


def decode(data: bytes) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP or TIFF file to uint8 RGB (height, width, 3), its EXIF orientation honoured.

    16-bit grey is reduced to its upper 8 bits, transparency is dropped, the first picture of several is taken.
    Raises RejectedImage for what is empty, truncated, broken, too large or none of these formats.
    """
    if not data:
        raise RejectedImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on large pictures and odd metadata
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=_FORMATS))
            if image.mode.startswith("I;16"):
                return cv2.cvtColor((np.asarray(image) >> 8).astype(np.uint8), cv2.COLOR_GRAY2RGB)
            if image.mode in ("I", "F"):
                raise RejectedImage("pixel format is neither 8 nor 16 bits")
            return np.asarray(image.convert("RGB"))
    except RejectedImage:
        raise
    except Image.DecompressionBombError:  # above 179 megapixels
        raise RejectedImage("too many pixels") from None
    except UnidentifiedImageError:
        raise RejectedImage("not a JPEG, PNG, WebP or TIFF image") from None
    except MemoryError:
        raise
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ... on broken files
        raise RejectedImage("truncated or broken image") from None


def choose_crops(image: np.ndarray, crop: Crop, rng: np.random.Generator) -> tuple[list[CropPlace], list[CropPlace]]:
    """Up to `crop.per_source` textured crops that don't overlap, in random order, and those found too smooth.

    Candidates form a grid: `rng` shifts it within what the picture's height leaves over, and each of its rows within
    what the width leaves over. A crop has texture if the standard deviation of its grey values is at least
    `crop.min_std` and the variance of its Laplacian at least `crop.min_laplacian` (8-bit grey levels).
    """
    height, width = image.shape[:2]
    rows, columns = height // crop.size, width // crop.size
    if not rows or not columns:
        raise RejectedImage("smaller than the crop")
    top = int(rng.integers(height - rows * crop.size + 1))
    lefts = rng.integers(width - columns * crop.size + 1, size=rows)
    chosen: list[CropPlace] = []
    smooth: list[CropPlace] = []
    for cell in rng.permutation(rows * columns):
        row, column = divmod(int(cell), columns)
        place = CropPlace(top + row * crop.size, int(lefts[row]) + column * crop.size, crop.size)
        (chosen if _has_texture(cut(image, place), crop) else smooth).append(place)
        if len(chosen) == crop.per_source:
            break
    if not chosen:
        raise RejectedImage("no crop has enough texture")
    return chosen, smooth


def cut(image: np.ndarray, place: CropPlace) -> np.ndarray:
    """The pixels of a crop, a view."""
    return image[place.top : place.top + place.size, place.left : place.left + place.size]


def _has_texture(pixels: np.ndarray, crop: Crop) -> bool:
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return float(grey.std()) >= crop.min_std and float(cv2.Laplacian(grey, cv2.CV_32F).var()) >= crop.min_laplacian
