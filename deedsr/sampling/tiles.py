"""Tiles: windows of a large picture that the UNet processes separately, and the weights that blend its outputs.

Lengths are in latent pixels. Shape suffixes: B batch, C channels, h w latent pixels.
"""

import math
from typing import NamedTuple

import torch

OVERLAP = 1 / 4  # of a tile's side, at least


class Window(NamedTuple):
    """A rectangle, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The part of `x` inside the window, as a view."""
        return x[..., self.top : self.bottom, self.left : self.right]

    def scaled(self, factor: float) -> "Window":
        """The window in other units."""
        return Window(*(round(factor * end) for end in self))

    def grown(self, reach: int, height: int, width: int) -> "Window":
        """Larger by `reach` on every side, clipped to the picture."""
        return Window(
            max(self.top - reach, 0),
            min(self.bottom + reach, height),
            max(self.left - reach, 0),
            min(self.right + reach, width),
        )

    def shrunk(self, reach: int, height: int, width: int) -> "Window":
        """Smaller by `reach` on every side that is not a border of the picture."""
        return Window(
            self.top + reach if self.top else 0,
            self.bottom - reach if self.bottom < height else height,
            self.left + reach if self.left else 0,
            self.right - reach if self.right < width else width,
        )

    def within(self, other: "Window") -> "Window":
        """The window in coordinates relative to `other`."""
        return Window(self.top - other.top, self.bottom - other.top, self.left - other.left, self.right - other.left)

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


class Mosaic:
    """Overlapping windows of one size on the UNet's grid, and smooth weights that sum to one everywhere.

    Args:
        height, width: of the latent, multiples of `multiple`.
        side: of a window, a multiple of `multiple` and at least two of it; None = one window for all.
        multiple: latent pixels per position of the UNet's deepest level. Windows start at multiples of it, so that
            downsampling is aligned as in the whole picture.
    """

    def __init__(self, height: int, width: int, side: int | None, multiple: int):
        self.side = side or max(height, width)
        rows, columns = (_starts(length, side or length, multiple) for length in (height, width))
        self.height, self.width = (min(side or length, length) for length in (height, width))
        self.windows = [Window(top, top + self.height, left, left + self.width) for top in rows for left in columns]
        row_weights, column_weights = _profiles(rows, self.height, height), _profiles(columns, self.width, width)
        self._weights = [(row, column) for row in row_weights for column in column_weights]

    def __len__(self) -> int:
        return len(self.windows)

    def add(self, total_Chw: torch.Tensor, number: int, piece_Chw: torch.Tensor) -> None:
        """Add a window's weighted output to the blended result."""
        rows, columns = (weights.to(piece_Chw.device) for weights in self._weights[number])
        self.windows[number].of(total_Chw).add_(piece_Chw * rows[:, None] * columns)


def _starts(length: int, side: int, multiple: int) -> list[int]:
    """Starts of windows that cover `length`, evenly spread, overlapping by OVERLAP or more."""
    if length <= side:
        return [0]
    units, window = length // multiple, side // multiple
    stride = window - math.ceil(OVERLAP * window)
    count = math.ceil((units - window) / stride) + 1
    return [multiple * (number * (units - window) // (count - 1)) for number in range(count)]


def _profiles(starts: list[int], side: int, length: int) -> torch.Tensor:
    """Weights (window, side) along one axis: squared-sine ramps where windows overlap, sum 1."""
    profiles = torch.ones(len(starts), side, dtype=torch.float64)
    for number in range(1, len(starts)):
        overlap = starts[number - 1] + side - starts[number]
        rise = torch.sin(torch.pi / 2 * (torch.arange(overlap) + 0.5) / overlap) ** 2
        profiles[number, :overlap] *= rise
        profiles[number - 1, side - overlap :] *= 1 - rise
    total = torch.zeros(length, dtype=torch.float64)
    for start, profile in zip(starts, profiles, strict=True):
        total[start : start + side] += profile
    return torch.stack(
        [profile / total[start : start + side] for start, profile in zip(starts, profiles, strict=True)]
    ).float()
