"""The member of a latents shard: what frozen networks make of a sample, as safetensors.

Means and standard deviations are those of the base's VAE, scaled to what its UNet works on, in fp16. The deviation
and not its logarithm: at Stable Diffusion's values (2e-4) fp16 keeps it to 0.05 %, the logarithm (-17) to 0.4 %. The
degradation vector stays in fp32: it is a hundredth of the bytes, and so exactly what the learner gives.
"""

from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

__all__ = ["EXTENSION", "Latents", "pack", "unpack"]

EXTENSION = "safetensors"


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
