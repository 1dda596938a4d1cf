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

SAMPLED = 4  # windows each way for the statistics, together as large as one core


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
    sampled = spread(height, width, max(side // SAMPLED, 1), SAMPLED)
    halo = reach(vae.encoder, 1 / factor)
    z_1Chw = torch.empty_like(noise_1Chw)
    with shared_statistics(
        vae.encoder, lambda: encode_latents(vae, torch.cat([pixels(one.scaled(factor)) for one in sampled]))
    ):
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
    sampled = spread(height, width, max(side // SAMPLED, 1), SAMPLED)
    halo = reach(vae.decoder, 1.0)
    with shared_statistics(vae.decoder, lambda: decode_latents(vae, torch.cat([one.of(z_1Chw) for one in sampled]))):
        for core in adjoining(height, width, side):
            seen = core.grown(halo, height, width)
            yield core.scaled(factor), core.within(seen).scaled(factor).of(decode_latents(vae, seen.of(z_1Chw)))


@contextmanager
def shared_statistics(network: nn.Module, measure: Callable[[], Any]) -> Iterator[None]:
    """Inside, the group norms of `network` use the statistics that they met in `measure`, pooled over its batch."""
    statistics: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def normalise(norm: nn.GroupNorm, inputs: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        if norm not in statistics:
            grouped = x.reshape(len(x), norm.num_groups, -1).float()
            of_groups = torch.var_mean(grouped, (0, 2), correction=0)
            statistics[norm] = tuple(s.repeat_interleave(norm.num_channels // norm.num_groups) for s in of_groups)
        variance, mean = (s.to(x.dtype) for s in statistics[norm])
        return F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)

    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [norm.register_forward_hook(normalise) for norm in norms]
    try:
        if norms:
            measure()
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
