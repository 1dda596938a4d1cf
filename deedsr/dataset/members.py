"""Members of a shard: encoded images, and latents as safetensors.

Image settings were chosen by benchmarks/codecs.py. Of latents, means and standard deviations are those of the base's
VAE, scaled to the UNet's input, in fp16. The deviation is stored and not its logarithm: at Stable Diffusion's values
(2e-4) fp16 keeps it to 0.05 %, the logarithm (-17) to 0.4 %. The degradation vector is fp32: it is a hundredth of the
bytes, and equal to the learner's output.
"""

import io
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

LATENTS_EXTENSION = "safetensors"
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


class Latents(NamedTuple):
    """Arrays (C, h, w) in fp16 and the degradation vector (D,) in fp32.

    A deviation is None where the VAE has no posterior (AutoencoderTiny): it is zero then. The vector is None where
    the shards were made without a learner.
    """

    hr_mean: np.ndarray
    hr_std: np.ndarray | None
    lr_mean: np.ndarray
    lr_std: np.ndarray | None
    degradation: np.ndarray | None


def pack(latents: Latents) -> bytes:
    """Equal arrays are equal bytes. Raises ValueError if a number does not fit its type."""
    arrays = {name: np.ascontiguousarray(array) for name, array in latents._asdict().items() if array is not None}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are infinite, not a number, or beyond {array.dtype}")
    return save(arrays)


def unpack(data: bytes) -> Latents:
    """Raises ValueError if it is not what `pack` gave."""
    try:
        found = load(data)
        return Latents(
            found["hr_mean"], found.get("hr_std"), found["lr_mean"], found.get("lr_std"), found.get("degradation")
        )
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from None
