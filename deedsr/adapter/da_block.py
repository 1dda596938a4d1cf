"""Degradation-aware blocks: kernels and channel weights come from the degradation vector (paper, 3.3).

Shape suffixes: B batch, C channels, H W space, D degradation vector, V the group's view of it.
"""

import torch
import torch.nn.functional as F
from torch import nn

KERNEL = 3


class DegradationAwareConv(nn.Module):
    """A depthwise convolution with kernels of its own for every sample, beside channel attention (paper, 3.3: DA).

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

    def forward(self, x_BCHW: torch.Tensor, view_BV: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x_BCHW.shape
        kernels = self.kernels(view_BV).view(batch * channels, 1, KERNEL, KERNEL)
        # Samples become groups of one convolution, so that each meets its own kernels.
        blurred = F.conv2d(
            x_BCHW.reshape(1, batch * channels, height, width), kernels, padding=KERNEL // 2, groups=batch * channels
        )
        weights_BC = 2 * torch.sigmoid(self.attention(view_BV))
        return self.mix(F.silu(blurred).view_as(x_BCHW)) + x_BCHW * weights_BC[:, :, None, None]


class DegradationAwareBlock(nn.Module):
    """Degradation-aware and plain convolutions in turn, without an inner residual (paper, 3.3: DAB)."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.aware1 = DegradationAwareConv(channels, reduction)
        self.conv1 = nn.Conv2d(channels, channels, KERNEL, padding=1)
        self.aware2 = DegradationAwareConv(channels, reduction)
        self.conv2 = nn.Conv2d(channels, channels, KERNEL, padding=1)

    def forward(self, x_BCHW: torch.Tensor, view_BV: torch.Tensor) -> torch.Tensor:
        h_BCHW = F.silu(self.aware1(x_BCHW, view_BV))
        h_BCHW = F.silu(self.conv1(h_BCHW))
        return self.conv2(F.silu(self.aware2(h_BCHW, view_BV)))


class DegradationAwareGroup(nn.Module):
    """One degradation-aware block as a residual (paper, 3.3: DAG).

    The last convolution starts at zero, so that the group starts as the identity and leaves the features that enter it
    undisturbed until it has learned something.
    """

    def __init__(self, channels: int, degradation_dim: int, reduction: int):
        super().__init__()
        self.view = nn.Linear(degradation_dim, channels, bias=False)
        self.block = DegradationAwareBlock(channels, reduction)
        self.conv = nn.Conv2d(channels, channels, KERNEL, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x_BCHW: torch.Tensor, degradation_BD: torch.Tensor) -> torch.Tensor:
        return x_BCHW + self.conv(self.block(x_BCHW, F.silu(self.view(degradation_BD))))
