"""The autoencoder on one picture of any size in bounded memory.

The picture is cut into adjoining cores. Each is computed with a halo as wide as the convolutions see, which is cut
off again. For AutoencoderTiny, convolutions and nothing else, the result is that of the whole picture. AutoencoderKL's
group norms divide by statistics of the whole picture, without which brightness and contrast would drift from core to
core: they are measured once, on windows spread over the picture, and then shared by all cores. Its one attention sees
core and halo. (diffusers' tiling blends cores that have drifted, and knows AutoencoderTiny with factor 8 only.)

Lengths are in latent cells unless they say pixels. Shape suffixes: C channels, H W pixels, h w latent cells.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import nn

from deedsr.sampling.latents import decode_latents, downsampling_factor, encode_latents
from deedsr.sampling.tiles import Window, adjoining, spread

SAMPLED = 3  # windows each way for the statistics, without their halos together as large as one core


def encode_in_tiles(
    vae: Any, pixels: Callable[[Window], torch.Tensor], noise_1Chw: torch.Tensor, side: int
) -> torch.Tensor:
    """Latents (1, C, h, w) of one picture, as from `encode_latents`.

    Args:
        pixels: gives a window in pixels of the picture (1, 3, H, W) in [-1, 1].
        noise_1Chw: for the posterior.
        side: of a core.
    """
    factor, (height, width) = downsampling_factor(vae), noise_1Chw.shape[2:]
    halo = reach(vae.encoder, 1 / factor)
    z_1Chw = torch.empty_like(noise_1Chw)

    def measure(windows: list[Window]) -> None:
        encode_latents(vae, torch.cat([pixels(window.scaled(factor)) for window in windows]))

    with shared_statistics(vae.encoder, height, width, side, halo, measure):
        for core in adjoining(height, width, side):
            seen = core.grown(halo, height, width)
            encoded = encode_latents(vae, pixels(seen.scaled(factor)), seen.of(noise_1Chw))
            core.of(z_1Chw).copy_(core.within(seen).of(encoded))
    return z_1Chw


def decode_in_tiles(vae: Any, z_1Chw: torch.Tensor, side: int) -> Iterator[tuple[Window, torch.Tensor]]:
    """Pieces (1, 3, ...) of the picture, nominally in [-1, 1], as from `decode_latents`, with their windows in pixels.

    `side`: of a core.
    """
    factor, (height, width) = downsampling_factor(vae), z_1Chw.shape[2:]
    halo = reach(vae.decoder, 1.0)

    def measure(windows: list[Window]) -> None:
        decode_latents(vae, torch.cat([window.of(z_1Chw) for window in windows]))

    with shared_statistics(vae.decoder, height, width, side, halo, measure):
        for core in adjoining(height, width, side):
            seen = core.grown(halo, height, width)
            yield core.scaled(factor), core.within(seen).scaled(factor).of(decode_latents(vae, seen.of(z_1Chw)))


@contextmanager
def shared_statistics(
    network: nn.Module, height: int, width: int, side: int, halo: int, measure: Callable[[list[Window]], None]
) -> Iterator[None]:
    """Inside, all group norms of `network` use statistics of the picture as `measure` met them.

    `measure` runs the network once on a batch of windows spread over the picture of `height` x `width`. Norms pool them
    over the batch, leaving out the halo of the windows, where their borders show.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    windows = spread(height, width, -(-side // SAMPLED) + 2 * halo, SAMPLED)
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


def reach(network: nn.Module, step: float) -> int:
    """Cells beyond its own that a latent cell, or a pixel of it, takes notice of through convolutions.

    `step`: cells from one position of the network's input to the next, 1 / factor for an encoder.
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
