"""Condition encoder: LR latent, diffusion time and degradation vector to tokens and feature maps (paper, 3.2).

Shape suffixes: B batch, C channels, H W space, N tokens, D token width or degradation vector.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from deedsr.adapter.da_block import DegradationAwareGroup, Kernels

EPS = 1e-5


class Condition(NamedTuple):
    """What the base is told about one low-resolution image at one diffusion time."""

    tokens: torch.Tensor  # (B, N, D): one token per position of the deepest level
    features: tuple[torch.Tensor, ...]  # (B, C, H / 2^i, W / 2^i) of level i, finest first


class PreparedDegradation(NamedTuple):
    """What the degradation vector alone decides: computed once for all diffusion times and places of an image."""

    levels: tuple[tuple[Kernels, Kernels], ...]  # of the degradation-aware group of each level

    @property
    def samples(self) -> int:
        return len(self.levels[0][0].gates)

    def of(self, samples_B: torch.Tensor) -> "PreparedDegradation":
        """That of the samples with these numbers, each as often as it is named."""
        return PreparedDegradation(tuple((first.of(samples_B), second.of(samples_B)) for first, second in self.levels))


def norm_groups(channels: int) -> int:
    """32 groups as in Stable Diffusion, or as many as narrow layers can have."""
    return math.gcd(32, channels)


def residual_block(channels: int, width: int, time_dim: int, down: bool = False) -> ResnetBlock2D:
    """Time-aware residual block that starts as its shortcut; `down` averages 2x2 on both paths."""
    block = ResnetBlock2D(
        in_channels=channels,
        out_channels=width,
        temb_channels=time_dim,
        groups=norm_groups(channels),
        groups_out=norm_groups(width),
        eps=EPS,
        down=down,
    )
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    return block


def self_attention(channels: int, heads: int) -> Attention:
    """Residual self-attention over positions that starts as the identity."""
    attention = Attention(
        channels,
        heads=heads,
        dim_head=channels // heads,
        norm_num_groups=norm_groups(channels),
        eps=EPS,
        bias=True,
        residual_connection=True,
    )
    nn.init.zeros_(attention.to_out[0].weight)
    nn.init.zeros_(attention.to_out[0].bias)
    return attention


class EncoderLevel(nn.Module):
    """One resolution: [halve,] residual block, degradation-aware group[, self-attention]."""

    def __init__(
        self,
        channels: int,
        width: int,
        time_dim: int,
        degradation_dim: int,
        reduction: int,
        down: bool,
        attention_heads: int,  # 0 = no attention
    ):
        super().__init__()
        self.down = residual_block(channels, channels, time_dim, down=True) if down else None
        self.resnet = residual_block(channels, width, time_dim)
        self.aware = DegradationAwareGroup(width, degradation_dim, reduction)
        self.attention = self_attention(width, attention_heads) if attention_heads else None

    def forward(
        self, x_BCHW: torch.Tensor, time_BD: torch.Tensor, degradation: torch.Tensor | tuple[Kernels, ...]
    ) -> torch.Tensor:
        if self.down is not None:
            x_BCHW = self.down(x_BCHW, time_BD)
        x_BCHW = self.aware(self.resnet(x_BCHW, time_BD), degradation)
        return x_BCHW if self.attention is None else self.attention(x_BCHW)


class ConditionEncoder(nn.Module):
    """Half a UNet, aware of time and degradation, with one residual block per level (paper, 3.2).

    Args:
        latent_channels: channels of the LR latent.
        widths: channels of each level, finest first; as many levels as the base's UNet has.
        attention_levels: levels with self-attention; the block after the deepest level always has one.
        attention_heads: of every self-attention.
        degradation_dim: length of the degradation vector.
        reduction: of the degradation-aware channel attention.
        feature_channels: channels of every feature map.
    """

    def __init__(
        self,
        latent_channels: int,
        widths: Sequence[int],
        attention_levels: Sequence[int],
        attention_heads: int,
        degradation_dim: int,
        reduction: int,
        feature_channels: int,
    ):
        super().__init__()
        time_dim = 4 * widths[0]
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)  # cosines first
        self.time_embedding = TimestepEmbedding(widths[0], time_dim)
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            EncoderLevel(
                widths[max(0, level - 1)],
                width,
                time_dim,
                degradation_dim,
                reduction,
                down=level > 0,
                attention_heads=attention_heads if level in attention_levels else 0,
            )
            for level, width in enumerate(widths)
        )
        self.features = nn.ModuleList(residual_block(width, feature_channels, time_dim) for width in widths)
        deepest = widths[-1]
        self.mid1 = residual_block(deepest, deepest, time_dim)
        self.mid_attention = self_attention(deepest, attention_heads)
        self.mid2 = residual_block(deepest, deepest, time_dim)
        self.gradient_checkpointing = False  # set, with the function, by diffusers' `enable_gradient_checkpointing`

    def prepare(self, degradation_BD: torch.Tensor) -> PreparedDegradation:
        """What `forward` takes in place of the degradation vector, the part of its work that never changes."""
        return PreparedDegradation(tuple(level.aware.prepare(degradation_BD) for level in self.levels))

    def forward(
        self, z_lr_BCHW: torch.Tensor, t_B: torch.Tensor, degradation: torch.Tensor | PreparedDegradation
    ) -> Condition:
        """Scaled LR latent, diffusion time in the scheduler's steps (B,), degradation vector (B, D) to the condition.

        Raises ValueError when a side of the latent is not a multiple of 2^(levels - 1).
        """
        multiple = 2 ** (len(self.levels) - 1)
        if any(side % multiple for side in z_lr_BCHW.shape[-2:]):
            height, width = z_lr_BCHW.shape[-2:]
            raise ValueError(f"latent sides must be multiples of {multiple}, got {height}x{width}: pad the image first")
        time_BD = self.time_embedding(self.time_proj(t_B).to(z_lr_BCHW.dtype))
        x_BCHW = self.conv_in(z_lr_BCHW)
        features = []
        known = [degradation] * len(self.levels) if isinstance(degradation, torch.Tensor) else degradation.levels
        for level, feature, degraded in zip(self.levels, self.features, known, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BCHW = self._gradient_checkpointing_func(level, x_BCHW, time_BD, degraded)
            else:
                x_BCHW = level(x_BCHW, time_BD, degraded)
            features.append(feature(x_BCHW, time_BD))
        x_BCHW = self.mid2(self.mid_attention(self.mid1(x_BCHW, time_BD)), time_BD)
        return Condition(tokens=x_BCHW.flatten(2).transpose(1, 2), features=tuple(features))
