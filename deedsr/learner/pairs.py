"""Positive pairs of the contrastive loss: two parts of one low-resolution image share its degradation."""

from typing import TypeVar

import numpy as np

Image = TypeVar("Image")  # numpy array or torch tensor


def quadrant_pair(lr_CHW: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    """Two different quadrants of one LR image, query and key, drawn without replacement (paper, 2.3).

    `lr_CHW` (C, H, W) is a numpy array or a tensor with even sides; the quadrants (C, H/2, W/2) are views of it.
    """
    height, width = lr_CHW.shape[-2:]  # type: ignore[attr-defined]
    if height % 2 or width % 2:
        raise ValueError(f"an image of {height}x{width} pixels has no equal quadrants: both sides must be even")
    query, key = (divmod(int(index), 2) for index in rng.choice(4, size=2, replace=False))
    h, w = height // 2, width // 2
    cut = lambda row, column: lr_CHW[..., row * h : (row + 1) * h, column * w : (column + 1) * w]  # type: ignore[index]
    return cut(*query), cut(*key)
