"""Image formats of the members of a shard.

Measured on a textured 512 px crop, one thread: PNG encodes in 12 ms to 367 kB and decodes in 7 ms; lossless WebP at
its fastest setting encodes in 10 ms to 268 kB and decodes in 4 ms.
"""

import io

import cv2
import numpy as np
from PIL import Image

__all__ = ["EXTENSIONS", "decode_stored", "encode"]

EXTENSIONS = {"png": "png", "webp": "webp", "jpeg": "jpg"}


def encode(image: np.ndarray, format: str, quality: int = 95) -> bytes:
    """Encodes uint8 RGB (height, width, 3) as `png`, `webp` (both lossless) or `jpeg` of that quality, 1 to 100."""
    if format == "webp":  # through Pillow: OpenCV only has the slowest of the lossless settings, 136 ms
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "WEBP", lossless=True, method=0, quality=0)
        return buffer.getvalue()
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if format == "jpeg" else []
    return cv2.imencode(f".{EXTENSIONS[format]}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def decode_stored(data: bytes) -> np.ndarray:
    """Decodes a member of a shard to uint8 RGB (height, width, 3). Raises ValueError if it is not a whole image."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    if image is None:
        raise ValueError("not an image that can be decoded")
    return image
