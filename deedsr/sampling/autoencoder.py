"""Images to latents and back, for AutoencoderKL and AutoencoderTiny, whole or in tiles of bounded memory.

In tiles, the picture is cut into adjoining cores. Each is computed with a halo as wide as the receptive field of the
convolutions, which is cut off again. AutoencoderTiny has convolutions only: the result is that of the whole picture.
AutoencoderKL's group norms divide by statistics of the whole picture, without which brightness and contrast would drift
from core to core: they are measured once, on windows sampled from the picture, and shared by all cores. Its one
attention sees core and halo. (diffusers' tiling blends cores that have drifted, and supports AutoencoderTiny with
factor 8 only.)

Lengths are in latent pixels unless they say pixels. Shape suffixes: B batch, C channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import nn

from deedsr.sampling.tiles import Window

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

    VAE: TypeAlias = AutoencoderKL | AutoencoderTiny

SAMPLED = 3  # windows each way for the statistics, without their halos together as large as one core


def downsampling_factor(vae: VAE) -> int:
    """Pixels per latent pixel and side."""
    config = vae.config
    channels = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 2 ** (len(channels) - 1)


def latent_moments(vae: VAE, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation (B, C, h, w) of the latents of images in [-1, 1], scaled to what the UNet works on.

    AutoencoderTiny has no posterior: its one latent, and None.
    """
    encoded, factor = vae.encode(x_BCHW), vae.config["scaling_factor"]
    if not hasattr(encoded, "latent_dist"):
        return (encoded.latents - _shift(vae)) * factor, None
    return (encoded.latent_dist.mean - _shift(vae)) * factor, encoded.latent_dist.std * factor


def encode_latents(vae: VAE, x_BCHW: torch.Tensor, noise_BChw: torch.Tensor | None = None) -> torch.Tensor:
    """Latents (B, C, h, w) of images in [-1, 1], scaled to what the UNet works on.

    Standard normal `noise_BChw` samples AutoencoderKL's posterior, as the paper does; without it its mode is taken.
    AutoencoderTiny has no posterior and ignores the noise.
    """
    mean_BChw, std_BChw = latent_moments(vae, x_BCHW)
    if noise_BChw is None or std_BChw is None:
        return mean_BChw
    return mean_BChw + std_BChw * noise_BChw


def decode_latents(vae: VAE, z_BChw: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), nominally in [-1, 1], of latents; the inverse of `encode_latents`."""
    return vae.decode(z_BChw / vae.config["scaling_factor"] + _shift(vae)).sample


def _shift(vae: VAE) -> float:
    return vae.config.get("shift_factor") or 0.0


def encode_in_tiles(
    vae: VAE, pixels: Callable[[Window], torch.Tensor], noise_1Chw: torch.Tensor, side: int
) -> torch.Tensor:
    """Latents (1, C, h, w) of one picture, as from `encode_latents`.

    Args:
        pixels: gives a window in pixels of the picture (1, 3, H, W) in [-1, 1].
        noise_1Chw: for the posterior.
        side: of a core.
    """
    factor, (height, width) = downsampling_factor(vae), noise_1Chw.shape[2:]
    halo = receptive_radius(vae.encoder, 1 / factor)
    z_1Chw = torch.empty_like(noise_1Chw)

    def measure(windows: list[Window]) -> None:
        encode_latents(vae, torch.cat([pixels(window.scaled(factor)) for window in windows]))

    with shared_statistics(vae.encoder, height, width, side, halo, measure):
        for core in cores(height, width, side):
            seen = core.grown(halo, height, width)
            encoded = encode_latents(vae, pixels(seen.scaled(factor)), seen.of(noise_1Chw))
            core.of(z_1Chw).copy_(core.within(seen).of(encoded))
    return z_1Chw


def decode_in_tiles(vae: VAE, z_1Chw: torch.Tensor, side: int) -> Iterator[tuple[Window, torch.Tensor]]:
    """Pieces (1, 3, ...) of the picture, nominally in [-1, 1], as from `decode_latents`, with their windows in pixels.

    `side`: of a core.
    """
    factor, (height, width) = downsampling_factor(vae), z_1Chw.shape[2:]
    halo = receptive_radius(vae.decoder, 1.0)

    def measure(windows: list[Window]) -> None:
        decode_latents(vae, torch.cat([window.of(z_1Chw) for window in windows]))

    with shared_statistics(vae.decoder, height, width, side, halo, measure):
        for core in cores(height, width, side):
            seen = core.grown(halo, height, width)
            yield core.scaled(factor), core.within(seen).scaled(factor).of(decode_latents(vae, seen.of(z_1Chw)))


def cores(height: int, width: int, side: int) -> list[Window]:
    """Windows of at most `side` that cover a picture without overlap."""
    return [
        Window(top, min(top + side, height), left, min(left + side, width))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def sampled_windows(height: int, width: int, side: int, count: int) -> list[Window]:
    """`count` x `count` windows of `side`, or of the picture's own sides, evenly spaced over it."""
    rows, columns = min(side, height), min(side, width)
    tops, lefts = (
        [number * (length - have) // max(count - 1, 1) for number in range(count)]
        for length, have in ((height, rows), (width, columns))
    )
    return [Window(top, top + rows, left, left + columns) for top in tops for left in lefts]


@contextmanager
def shared_statistics(
    network: nn.Module, height: int, width: int, side: int, halo: int, measure: Callable[[list[Window]], None]
) -> Iterator[None]:
    """Inside, all group norms of `network` use the statistics of the picture that `measure` collects.

    `measure` runs the network once on a batch of windows spread over the picture of `height` x `width`. Norms pool them
    over the batch, leaving out the halo of the windows, where their borders show.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    windows = sampled_windows(height, width, -(-side // SAMPLED) + 2 * halo, SAMPLED)
    rows, columns = windows[0].bottom - windows[0].top, windows[0].right - windows[0].left
    inner = [window.shrunk(halo, height, width).within(window) for window in windows]
    statistics: dict[nn.Module, tuple[torch.Tensor, ...]] = {}

    def moments(norm: nn.GroupNorm, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Variance and mean of each channel's group, fp32: fp16 ends at 65,504, and bf16 has eight bits."""
        x_BCHW = x if x.ndim == 4 else x.unflatten(2, (rows, columns))  # attention has its positions in a row
        scale = x_BCHW.shape[2] / rows
        parts = [part.scaled(scale).of(one).flatten(1) for part, one in zip(inner, x_BCHW, strict=True)]
        grouped = torch.cat(parts, 1).float().view(norm.num_groups, -1)
        of_groups = torch.var_mean(grouped, 1, correction=0)
        return tuple(each.repeat_interleave(norm.num_channels // norm.num_groups) for each in of_groups)

    def normalise(norm: nn.GroupNorm, inputs: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        if norm not in statistics:
            statistics[norm] = moments(norm, inputs[0])
        variance, mean = statistics[norm]
        return F.batch_norm(inputs[0], mean, variance, norm.weight.float(), norm.bias.float(), eps=norm.eps)

    hooks = [norm.register_forward_hook(normalise) for norm in norms]
    try:
        if norms:
            measure(windows)
        yield
    finally:
        for hook in hooks:
            hook.remove()


def receptive_radius(network: nn.Module, step: float) -> int:
    """Receptive-field radius of the convolutions of `network`, in latent pixels.

    `step`: latent pixels from one position of the network's input to the next, 1 / factor for an encoder.
    """
    seen = 0.0
    for part in ("layers", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out"):  # in the order of computing
        for module in getattr(network, part, nn.Identity()).modules():
            if isinstance(module, nn.Conv2d):
                seen += module.kernel_size[0] // 2 * step
                step *= module.stride[0]
            elif isinstance(module, nn.Upsample | Upsample2D):
                step /= 2
    return math.ceil(seen)
