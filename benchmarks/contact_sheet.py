"""A contact sheet: rows of pictures of one size under their columns' names."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BAND, GAP = 26, 4  # height of the line with names; pixels between pictures


def centre(picture: np.ndarray, side: int) -> np.ndarray:
    """The middle `side` x `side` pixels."""
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def squares(lr: np.ndarray, scale: int) -> np.ndarray:
    """The LR with its pixels as squares."""
    return cv2.resize(lr, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)


def write_sheet(path: Path, names: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> None:
    """JPEG or PNG by the path's ending."""
    side = rows[0][0].shape[0] + GAP
    sheet = Image.new("RGB", (side * len(names) - GAP, BAND + side * len(rows) - GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for column, name in enumerate(names):
        pen.text((column * side + 4, 3), name, "black", font)
        for row, pictures in enumerate(rows):
            sheet.paste(Image.fromarray(pictures[column]), (column * side, BAND + row * side))
    sheet.save(path, **({} if path.suffix == ".png" else {"quality": 88, "subsampling": 0}))
