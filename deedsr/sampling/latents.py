"""Images to latents and back, for AutoencoderKL and AutoencoderTiny alike.

Shape suffixes: B batch, C channels, H W pixels, h w latent cells.
"""

from typing import Any

import torch
from torch.nn.functional import interpolate

from deedsr.sampling.images import mirrored
from deedsr.sampling.tiles import Window

BICUBIC_REACH = 2  # LR pixels on either side


def enlarge(lr_BCHW: torch.Tensor, scale: int) -> torch.Tensor:
    """Bicubic enlargement in [0, 1], not antialiased, overshoot cut off: what the base sees of an LR image."""
    return interpolate(lr_BCHW, scale_factor=scale, mode="bicubic", align_corners=False).clamp(0, 1)


def enlarge_window(lr_BCHW: torch.Tensor, scale: int, window: Window) -> torch.Tensor:
    """A window, in its pixels, of the enlarged image, which goes on mirrored beyond right and bottom.

    The same numbers as cutting it out of the whole, which is never made.
    """
    indices = []
    for dim, (begin, end) in ((2, window[:2]), (3, window[2:])):
        index = mirrored(scale * lr_BCHW.shape[dim], begin, end)
        first = max(int(index.min()) // scale - BICUBIC_REACH, 0)
        last = min(int(index.max()) // scale + BICUBIC_REACH, lr_BCHW.shape[dim] - 1)
        lr_BCHW = lr_BCHW.narrow(dim, first, last - first + 1)
        indices.append((index - scale * first).to(lr_BCHW.device))
    return enlarge(lr_BCHW, scale)[:, :, indices[0]][:, :, :, indices[1]]


def downsampling_factor(vae: Any) -> int:
    """Pixels per latent cell and side."""
    config = vae.config
    channels = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 2 ** (len(channels) - 1)


def latent_moments(vae: Any, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation (B, C, h, w) of the latents of images in [-1, 1], scaled to what the UNet works on.

    AutoencoderTiny has no posterior: its one latent, and None.
    """
    encoded, factor = vae.encode(x_BCHW), vae.config["scaling_factor"]
    if not hasattr(encoded, "latent_dist"):
        return (encoded.latents - _shift(vae)) * factor, None
    return (encoded.latent_dist.mean - _shift(vae)) * factor, encoded.latent_dist.std * factor


def encode_latents(vae: Any, x_BCHW: torch.Tensor, noise_BChw: torch.Tensor | None = None) -> torch.Tensor:
    """Latents (B, C, h, w) of images in [-1, 1], scaled to what the UNet works on.

    Standard normal `noise_BChw` samples AutoencoderKL's posterior, as the paper does; without it its mode is taken.
    AutoencoderTiny has no posterior, the noise does nothing there.
    """
    mean_BChw, std_BChw = latent_moments(vae, x_BCHW)
    if noise_BChw is None or std_BChw is None:
        return mean_BChw
    return mean_BChw + std_BChw * noise_BChw


def decode_latents(vae: Any, z_BChw: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), nominally in [-1, 1], of latents; the inverse of `encode_latents`."""
    return vae.decode(z_BChw / vae.config["scaling_factor"] + _shift(vae)).sample


def _shift(vae: Any) -> float:
    return vae.config.get("shift_factor") or 0.0
