"""Condition encoder: LR latent, diffusion time and degradation vector to tokens and feature maps (docs/method.md, 3.2).

Shape suffixes: B batch, C channels, H W space, N tokens, D token width or degradation vector.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from deedsr.adapter.da_block import DegradationAwareGroup, Kernels

EPS = 1e-5


class Condition(NamedTuple):
    """Conditioning of the UNet on LR images at one timestep."""

    tokens: torch.Tensor  # (B, N, D): one token per position of the deepest level
    features: tuple[torch.Tensor, ...]  # (B, C, H / 2^i, W / 2^i) of level i, finest first


class PreparedDegradation(NamedTuple):
    """Kernels and gates of all levels, computed once from the degradation vector for all timesteps and tiles."""

    samples: int
    levels: tuple[tuple[Kernels, Kernels] | None, ...]  # of the group of each level, where there are groups

    def of(self, samples_B: torch.Tensor) -> "PreparedDegradation":
        """Select samples by index; an index may repeat."""
        levels = (level and (level[0].of(samples_B), level[1].of(samples_B)) for level in self.levels)
        return PreparedDegradation(len(samples_B), tuple(levels))


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
    """One resolution: [halve,] residual block[, degradation-aware group][, self-attention]."""

    def __init__(
        self,
        channels: int,
        width: int,
        time_dim: int,
        degradation_dim: int,
        reduction: int,
        down: bool,
        attention_heads: int,  # 0 = no attention
        aware: bool = True,
    ):
        super().__init__()
        self.down = residual_block(channels, channels, time_dim, down=True) if down else None
        self.resnet = residual_block(channels, width, time_dim)
        self.aware = DegradationAwareGroup(width, degradation_dim, reduction) if aware else None
        self.attention = self_attention(width, attention_heads) if attention_heads else None

    def forward(
        self, x_BCHW: torch.Tensor, time_BD: torch.Tensor, degradation: torch.Tensor | tuple[Kernels, ...] | None
    ) -> torch.Tensor:
        if self.down is not None:
            x_BCHW = self.down(x_BCHW, time_BD)
        x_BCHW = self.resnet(x_BCHW, time_BD)
        if self.aware is not None:
            x_BCHW = self.aware(x_BCHW, degradation)
        return x_BCHW if self.attention is None else self.attention(x_BCHW)


class ConditionEncoder(nn.Module):
    """Half a UNet, aware of time and degradation, with one residual block per level (docs/method.md, 3.2).

    Args:
        latent_channels: channels of the LR latent.
        widths: channels of each level, finest first; as many levels as the base's UNet has.
        attention_levels: levels with self-attention; the block after the deepest level always has one.
        attention_heads: of every self-attention.
        degradation_dim: length of the degradation vector.
        reduction: of the degradation-aware channel attention.
        feature_channels: channels of every feature map.
    """

    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def __init__(
        self,
        latent_channels: int,
        widths: Sequence[int],
        attention_levels: Sequence[int],
        attention_heads: int,
        degradation_dim: int,
        reduction: int,
        feature_channels: int,
        ablate: Collection[str] = (),
        blank_token_width: int = 0,
    ):
        super().__init__()
        self.blank_token_width = blank_token_width
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
                aware="da" not in ablate,
            )
            for level, width in enumerate(widths)
        )
        # Ablation "vector": one learned vector for all images in place of the learner's.
        constant = "vector" in ablate and "da" not in ablate
        self.constant_vector = nn.Parameter(torch.ones(degradation_dim)) if constant else None
        described = [] if "local" in ablate else widths
        self.features = nn.ModuleList(residual_block(width, feature_channels, time_dim) for width in described)
        self.has_tokens = "global" not in ablate
        if self.has_tokens:
            deepest = widths[-1]
            self.mid1 = residual_block(deepest, deepest, time_dim)
            self.mid_attention = self_attention(deepest, attention_heads)
            self.mid2 = residual_block(deepest, deepest, time_dim)
        self.gradient_checkpointing = False  # set, with the function, by diffusers' `enable_gradient_checkpointing`

    def prepare(self, degradation_BD: torch.Tensor) -> PreparedDegradation:
        """Kernels and gates for `forward`, in place of the degradation vector."""
        seen_BD = self._seen(degradation_BD)
        levels = (
            None if level.aware is None else level.aware.prepare(seen_BD)
            for level in cast(Sequence[EncoderLevel], self.levels)
        )
        return PreparedDegradation(len(degradation_BD), tuple(levels))

    def _seen(self, degradation_BD: torch.Tensor) -> torch.Tensor:
        """The vector that the levels see in place of the learner's."""
        return degradation_BD if self.constant_vector is None else self.constant_vector.expand(len(degradation_BD), -1)

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
        known: Sequence[torch.Tensor | tuple[Kernels, Kernels] | None]
        if isinstance(degradation, PreparedDegradation):
            known = degradation.levels
        else:
            known = [self._seen(degradation)] * len(self.levels)
        for number, (level, degraded) in enumerate(zip(self.levels, known, strict=True)):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BCHW = self._gradient_checkpointing_func(level, x_BCHW, time_BD, degraded)
            else:
                x_BCHW = level(x_BCHW, time_BD, degraded)
            if self.features:
                features.append(self.features[number](x_BCHW, time_BD))
        if not self.has_tokens:
            return Condition(x_BCHW.new_zeros(len(x_BCHW), 1, self.blank_token_width), tuple(features))
        x_BCHW = self.mid2(self.mid_attention(self.mid1(x_BCHW, time_BD)), time_BD)
        return Condition(tokens=x_BCHW.flatten(2).transpose(1, 2), features=tuple(features))
