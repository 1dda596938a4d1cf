"""The convolutions of VGG16 (Simonyan and Zisserman 2015) with a given pooling, named as in torchvision's file.

Shapes: B batch, C channels, H W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from deedsr.metrics.weights import WeightsFile

__all__ = ["FILE", "VGG16", "HannPooling"]

FILE = WeightsFile("vgg16-397923af.pth", "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth")
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions between poolings


class VGG16(nn.Module):
    """`forward(x_BCHW)` returns the last feature map of each of the five stages. `pooling`: made for each gap."""

    def __init__(self, pooling: Callable[[], nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends, inputs = [], 3
        for channels, convolutions in STAGES:
            layers += [pooling()] if layers else []
            for _ in range(convolutions):
                layers += [nn.Conv2d(inputs, channels, kernel_size=3, padding=1), nn.ReLU()]
                inputs = channels
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        found = []
        for number, layer in enumerate(self.features):
            x_BCHW = layer(x_BCHW)
            if number in self.ends:
                found.append(x_BCHW)
        return found


class HannPooling(nn.Module):
    """L2 pooling of DISTS: the root of the squares' mean in a 3x3 Hann window, at every second pixel."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        taps = torch.hann_window(5, periodic=False, dtype=x_BCHW.dtype, device=x_BCHW.device)[1:-1]
        window = torch.outer(taps, taps) / taps.sum().square()
        channels = x_BCHW.shape[1]
        squares = conv2d(x_BCHW.square(), window.expand(channels, 1, 3, 3), stride=2, padding=1, groups=channels)
        return (squares + 1e-12).sqrt()
