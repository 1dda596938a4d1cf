"""Which squares of a source become HR images."""

from typing import NamedTuple

import cv2
import numpy as np

from deedsr.dataset.pictures import RejectedImage
from deedsr.dataset.recipe import Crop

__all__ = ["CropPlace", "choose_crops", "cut"]


class CropPlace(NamedTuple):
    """A square of the source, in pixels of the source as seen (EXIF orientation applied)."""

    top: int
    left: int
    size: int


def choose_crops(image: np.ndarray, crop: Crop, rng: np.random.Generator) -> tuple[list[CropPlace], list[CropPlace]]:
    """Up to `crop.per_source` textured crops that don't overlap, in random order, and those found too smooth.

    Candidates form a grid: `rng` shifts it within what the picture's height leaves over, and each of its rows within
    what the width leaves over. A crop has texture if the standard deviation of its grey values is at least
    `crop.min_std` and the variance of its Laplacian at least `crop.min_laplacian` (8-bit grey levels).
    Raises RejectedImage for a picture that is smaller than a crop, or has no textured one.
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
    """Decides what is in a dataset, so in integers: sums of floats depend on how a processor groups them."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return _varies(grey, crop.min_std**2) and _varies(cv2.Laplacian(grey, cv2.CV_16S), crop.min_laplacian)


def _varies(values: np.ndarray, least: float) -> bool:
    """Whether the variance of uint8 or int16 `values` is at least `least`, times N^2 on both sides: no division."""
    squares = int(np.square(values, dtype=np.int32).sum(dtype=np.int64))
    total = int(cv2.sumElems(values)[0])  # doubles hold these integers exactly, in whichever order they are added
    return values.size * squares - total**2 >= least * values.size**2
