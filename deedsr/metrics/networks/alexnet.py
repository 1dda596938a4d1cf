"""The convolutions of AlexNet (Krizhevsky 2014), named as in torchvision's file.

Shapes: B batch, C channels, H W pixels.
"""

from torch import Tensor, nn

from deedsr.metrics.weights import WeightsFile

__all__ = ["FILE", "AlexNet"]

FILE = WeightsFile(
    "alexnet-owt-7be5be79.pth", "7be5be79", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
)


class AlexNet(nn.Module):
    """`forward(x_BCHW)` returns what the five ReLUs give: 64, 192, 384, 256 and 256 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        found = []
        for layer in self.features:
            x_BCHW = layer(x_BCHW)
            if isinstance(layer, nn.ReLU):
                found.append(x_BCHW)
        return found
