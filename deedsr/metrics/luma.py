"""BT.601 luma, the channel that the field measures on."""

import numpy as np

# MATLAB's rgb2ycbcr on 8-bit RGB: Y runs from 16 to 235.
_WEIGHTS = np.array([65.481, 128.553, 24.966]) / 255


def luma(image: np.ndarray, border: int = 0) -> np.ndarray:
    """Y of an 8-bit RGB image (H, W, 3) as float64 (H, W) in 16..235, without `border` pixels on each side.

    Raises ValueError for anything but uint8 RGB and for an image that the border eats up.
    """
    _require_rgb(image)
    height, width = image.shape[:2]
    if border < 0 or min(height, width) <= 2 * border:
        raise ValueError(f"an image of {height}x{width} pixels has nothing inside a border of {border}")
    inside = image[border : height - border, border : width - border]
    return inside.astype(np.float64) @ _WEIGHTS + 16


def grey(image: np.ndarray) -> np.ndarray:
    """.299 R + .587 G + .114 B of an 8-bit RGB image (H, W, 3) as float64 (H, W) in 0..255, for NIQE.

    One colour in a thousand lies half-way between two integers. Published logs were computed in float32: so are these
    values, but for the sum, which is rounded once.
    """
    _require_rgb(image)
    shares = (image.astype(np.float32) / 255).astype(np.float64)
    weights = np.array([0.299, 0.587, 0.114], np.float32).astype(np.float64)
    return ((shares @ weights).astype(np.float32) * np.float32(255)).astype(np.float64)


def _require_rgb(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"metrics take uint8 RGB images (H, W, 3), got {image.dtype} of shape {image.shape}")
