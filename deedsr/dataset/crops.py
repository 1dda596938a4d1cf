"""Which squares of a source become HR images."""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from deedsr.dataset.pictures import RejectedImage
from deedsr.dataset.recipe import Crop

_TRIES = 4  # for each crop that may overlap others, until that many smooth or equal ones were drawn
_STEP = 12  # pixels between the places of such crops: a multiple of every scale, as real LR partners need


class CropPlace(NamedTuple):
    """A square of the source, in pixels of the source as seen (EXIF orientation applied)."""

    top: int
    left: int
    size: int


def choose_crops(image: np.ndarray, crop: Crop, rng: np.random.Generator) -> tuple[list[CropPlace], list[CropPlace]]:
    """Up to `crop.per_source` textured crops in random order, and those found too smooth.

    `crop.place` says where they may lie. "grid": on the cells of a grid, which `rng` shifts within what the picture's
    height leaves over, and each of its rows within what the width leaves over. "center": in the middle. "anywhere":
    `rng` draws their places, and they may overlap. A crop has texture if the standard deviation of its grey values is
    at least `crop.min_std` and the variance of its Laplacian at least `crop.min_laplacian` (8-bit grey levels).
    Raises RejectedImage for a picture that is smaller than a crop, or has no textured one.
    """
    height, width = image.shape[:2]
    if min(height, width) < crop.size:
        raise RejectedImage("smaller than the crop")
    chosen: list[CropPlace] = []
    smooth: list[CropPlace] = []
    for place in _places(height, width, crop, rng):
        # This decides what is in a dataset, so in integers: sums of floats depend on how a processor groups them.
        grey = cv2.cvtColor(cut(image, place), cv2.COLOR_RGB2GRAY)
        textured = _varies(grey, crop.min_std**2) and _varies(cv2.Laplacian(grey, cv2.CV_16S), crop.min_laplacian)
        (chosen if textured else smooth).append(place)
        if len(chosen) == crop.per_source:
            break
    if not chosen:
        raise RejectedImage("no crop has enough texture")
    return chosen, smooth


def _places(height: int, width: int, crop: Crop, rng: np.random.Generator) -> Iterator[CropPlace]:
    """Candidates of a picture that is no smaller than a crop."""
    size = crop.size
    if crop.place == "center":
        yield CropPlace((height - size) // 2, (width - size) // 2, size)
    elif crop.place == "anywhere":
        rows, columns = (height - size) // _STEP + 1, (width - size) // _STEP + 1
        drawn = rng.integers((rows, columns), size=(_TRIES * crop.per_source, 2))
        for row, column in dict.fromkeys(map(tuple, drawn.tolist())):  # each place once
            yield CropPlace(row * _STEP, column * _STEP, size)
    else:
        rows, columns = height // size, width // size
        top = int(rng.integers(height - rows * size + 1))
        lefts = rng.integers(width - columns * size + 1, size=rows)
        for cell in rng.permutation(rows * columns):
            row, column = divmod(int(cell), columns)
            yield CropPlace(top + row * size, int(lefts[row]) + column * size, size)


def cut(image: np.ndarray, place: CropPlace) -> np.ndarray:
    """The pixels of a crop, a view."""
    return image[place.top : place.top + place.size, place.left : place.left + place.size]


def _varies(values: np.ndarray, least: float) -> bool:
    """Whether the variance of uint8 or int16 `values` is at least `least`, times N^2 on both sides: no division."""
    squares = int(np.square(values, dtype=np.int32).sum(dtype=np.int64))
    total = int(cv2.sumElems(values)[0])  # doubles hold these integers exactly, in whichever order they are added
    return values.size * squares - total**2 >= least * values.size**2
