"""4K sources for the benchmarks: mosaics of the shipped photographs, as a camera's JPEGs."""

from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np

WIDTH, HEIGHT, QUALITY = 3840, 2160, 92


def make_sources(folder: Path, count: int, distinct: int = 12) -> None:
    """`count` names for `distinct` pictures of 3840x2160: crops and degradations follow from the name."""
    paths = sorted(Path(str(files("deedsr") / "assets" / "photos" / "train")).glob("*.jpg"))
    photos = [cv2.imread(str(path)) for path in paths]
    folder.mkdir(parents=True)
    for number in range(min(count, distinct)):
        data = cv2.imencode(".jpg", _mosaic(photos, number), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
        (folder / f"{number:05d}.jpg").write_bytes(data.tobytes())
    for number in range(distinct, count):
        (folder / f"{number:05d}.jpg").symlink_to(folder / f"{number % distinct:05d}.jpg")


def _mosaic(photos: list[np.ndarray], first: int) -> np.ndarray:
    """Photographs side by side, in rows, until the picture is full."""
    canvas = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    top, number = 0, first
    while top < HEIGHT:
        left, row_height = 0, HEIGHT
        while left < WIDTH:
            photo = photos[number % len(photos)][: HEIGHT - top, : WIDTH - left]
            canvas[top : top + photo.shape[0], left : left + photo.shape[1]] = photo
            left, row_height = left + photo.shape[1], min(row_height, photo.shape[0])
            number += 1
        top += row_height
    return canvas
