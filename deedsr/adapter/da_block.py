"""Degradation-aware blocks: kernels and channel weights come from the degradation vector (docs/method.md, 3.3).

Shape suffixes: B batch, C channels, H W space, K side of a kernel, D degradation vector, V the group's view of it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

KERNEL = 3


class Kernels(NamedTuple):
    """The part of a degradation-aware convolution that depends on the degradation vector alone."""

    depthwise: torch.Tensor  # (B, C, K, K)
    gates: torch.Tensor  # (B, C), 0 to 2

    def of(self, samples_B: torch.Tensor) -> "Kernels":
        """Select samples by index; an index may repeat."""
        return Kernels(self.depthwise[samples_B], self.gates[samples_B])


class DegradationAwareConv(nn.Module):
    """Depthwise convolution with kernels per sample, plus channel attention (docs/method.md, 3.3: DA).

    `reduction`: channels per hidden unit of the channel attention.
    """

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.kernels = nn.Sequential(
            nn.Linear(channels, channels, bias=False),
            nn.SiLU(),
            nn.Linear(channels, channels * KERNEL**2, bias=False),
        )
        self.mix = nn.Conv2d(channels, channels, 1)
        self.attention = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.SiLU(),
            nn.Linear(channels // reduction, channels, bias=False),
        )

    def prepare(self, view_BV: torch.Tensor) -> Kernels:
        depthwise = self.kernels(view_BV).view(len(view_BV), -1, KERNEL, KERNEL)
        return Kernels(depthwise, 2 * torch.sigmoid(self.attention(view_BV)))

    def forward(self, x_BCHW: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        batch, channels, height, width = x_BCHW.shape
        # One grouped convolution over the whole batch: each sample has its own kernels.
        blurred = F.conv2d(
            x_BCHW.reshape(1, batch * channels, height, width),
            kernels.depthwise.reshape(batch * channels, 1, KERNEL, KERNEL),
            padding=KERNEL // 2,
            groups=batch * channels,
        )
        return self.mix(F.silu(blurred).view_as(x_BCHW)) + x_BCHW * kernels.gates[:, :, None, None]


class DegradationAwareBlock(nn.Module):
    """Degradation-aware and plain convolutions in turn, without an inner residual (docs/method.md, 3.3: DAB)."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.aware1 = DegradationAwareConv(channels, reduction)
        self.conv1 = nn.Conv2d(channels, channels, KERNEL, padding=1)
        self.aware2 = DegradationAwareConv(channels, reduction)
        self.conv2 = nn.Conv2d(channels, channels, KERNEL, padding=1)

    def prepare(self, view_BV: torch.Tensor) -> tuple[Kernels, Kernels]:
        return self.aware1.prepare(view_BV), self.aware2.prepare(view_BV)

    def forward(self, x_BCHW: torch.Tensor, kernels: tuple[Kernels, Kernels]) -> torch.Tensor:
        h_BCHW = F.silu(self.aware1(x_BCHW, kernels[0]))
        h_BCHW = F.silu(self.conv1(h_BCHW))
        return self.conv2(F.silu(self.aware2(h_BCHW, kernels[1])))


class DegradationAwareGroup(nn.Module):
    """One degradation-aware block as a residual (docs/method.md, 3.3: DAG).

    The last convolution starts at zero, so the group starts as the identity.
    """

    def __init__(self, channels: int, degradation_dim: int, reduction: int):
        super().__init__()
        self.view = nn.Linear(degradation_dim, channels, bias=False)
        self.block = DegradationAwareBlock(channels, reduction)
        self.conv = nn.Conv2d(channels, channels, KERNEL, padding=1)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def prepare(self, degradation_BD: torch.Tensor) -> tuple[Kernels, Kernels]:
        """Kernels and gates for `forward`, in place of the vector; the same at every timestep and position."""
        return self.block.prepare(F.silu(self.view(degradation_BD)))

    def forward(self, x_BCHW: torch.Tensor, degradation: torch.Tensor | tuple[Kernels, Kernels]) -> torch.Tensor:
        """`degradation`: vectors (B, D), or what `prepare` made of them."""
        kernels = self.prepare(degradation) if isinstance(degradation, torch.Tensor) else degradation
        return x_BCHW + self.conv(self.block(x_BCHW, kernels))
