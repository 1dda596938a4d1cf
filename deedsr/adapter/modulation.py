"""Local branch: feature maps of the LR image scale and shift the base's residual blocks (docs/method.md, 3.5).

Shape suffixes: B batch, C channels of the base, F feature channels, H W space.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Modulation(nn.Module):
    """h (1 + gamma) + beta without normalisation; gamma and beta come from the feature map of the same level
    (docs/method.md, 3.5).

    Starts as the identity. Only gamma and beta start at zero: with the shared convolution at zero as well, no gradient
    would ever reach any weight of the branch.
    """

    def __init__(self, channels: int, feature_channels: int, hidden: int):
        super().__init__()
        self.shared = nn.Conv2d(feature_channels, hidden, 3, padding=1)
        self.gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.beta = nn.Conv2d(hidden, channels, 3, padding=1)
        for conv in (self.gamma, self.beta):
            for parameter in conv.parameters():
                nn.init.zeros_(parameter)

    def forward(self, h_BCHW: torch.Tensor, feature_BFHW: torch.Tensor) -> torch.Tensor:
        shared = F.relu(self.shared(feature_BFHW))
        return h_BCHW * (1 + self.gamma(shared)) + self.beta(shared)
