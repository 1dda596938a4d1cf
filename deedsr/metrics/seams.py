"""Seam energy: whether a picture made in parts shows where they meet."""

from collections.abc import Sequence

import numpy as np

from deedsr.metrics.luma import luma


def seam_energy(image: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> float:
    """Mean gradient of Y across borders over that elsewhere, of a uint8 RGB image (H, W, 3); without seams about 1.

    `rows`, `columns`: borders lie before these rows and columns of pixels. What the picture itself has there counts
    too: compare with a picture that was made as a whole. Raises ValueError where there is no border inside.
    """
    y = luma(image)
    across, elsewhere = [], []
    for axis, borders in ((0, rows), (1, columns)):
        steps = np.abs(np.diff(y, axis=axis))
        at = np.isin(np.arange(1, y.shape[axis]), borders)
        across.append(steps.compress(at, axis).ravel())
        elsewhere.append(steps.compress(~at, axis).ravel())
    crossed = np.concatenate(across)
    if not crossed.size:
        raise ValueError(f"none of the borders {[*rows]} and {[*columns]} lies inside {y.shape[0]}x{y.shape[1]} pixels")
    return float(crossed.mean() / np.concatenate(elsewhere).mean())
