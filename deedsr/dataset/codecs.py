"""Image formats of the members of a shard (measured by benchmarks/codecs.py)."""

import io

import cv2
import numpy as np
from PIL import Image

__all__ = ["EXTENSIONS", "decode_stored", "encode"]

EXTENSIONS = {"png": "png", "webp": "webp", "jpeg": "jpg"}
# The fewest bytes among the settings that need no more time than OpenCV's own: photographs rarely repeat themselves,
# which is why looking for matches (level 2 and up) does not pay.
_PNG = [
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP),
]


def encode(image: np.ndarray, format: str, quality: int = 95) -> bytes:
    """Encodes uint8 RGB (height, width, 3) as `png`, `webp` (both lossless) or `jpeg` of that quality, 1 to 100."""
    if format == "webp":  # through Pillow: OpenCV only has the slowest of the lossless settings, 136 ms
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "WEBP", lossless=True, method=0, quality=0)
        return buffer.getvalue()
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if format == "jpeg" else _PNG
    return cv2.imencode(f".{EXTENSIONS[format]}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def decode_stored(data: bytes) -> np.ndarray:
    """Decodes a member of a shard to uint8 RGB (height, width, 3). Raises ValueError if it is not a whole image."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    if image is None:
        raise ValueError("not an image that can be decoded")
    return image
