"""Degradation learner: encodes how a low-resolution image was degraded in one vector.

The paper's is a ResNet on the pixels. A small network on `PictureStatistics` can be added to it or replace it.
Shape suffixes: B batch, C channels, H W space, D vector width.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.utils.checkpoint import checkpoint

from deedsr.learner.normalization import GroupedBatchNorm2d
from deedsr.learner.statistics import PictureStatistics
from deedsr.precision import wide

OUTLIER = 5.0  # standard deviations; statistics of flat and of huge pictures are clamped

# Keys in the `config.json` of earlier versions, each with the only value that is read.
REMOVED_KEYS = {"high_pass": False, "projection": 0, "stem_stride": 4}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut (docs/method.md, 2.1)."""

    def __init__(self, channels: int, width: int, stride: int, norm_group: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = GroupedBatchNorm2d(width, norm_group)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = GroupedBatchNorm2d(width, norm_group)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), GroupedBatchNorm2d(width, norm_group)
            )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)))
        return F.relu(self.norm2(self.conv2(h_BCHW)) + self.shortcut(x_BCHW))


class ExactLinear(nn.Linear):
    """Linear layer that computes in fp64: fp32 results of BLAS depend on memory alignment, which differs between
    trained weights and weights loaded from a file."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(wide(x), wide(self.weight), wide(self.bias)).to(x.dtype)


class StatisticsNetwork(nn.Module):
    """Statistics of the picture, standardised, through linear layers to a standardised vector (B, D).

    Raises ValueError in training mode as `GroupedBatchNorm2d` does.
    """

    def __init__(self, hidden: Sequence[int], dim: int, norm_group: int):
        super().__init__()
        self.statistics = PictureStatistics()
        self.norm = GroupedBatchNorm2d(self.statistics.size, norm_group)
        layers: list[nn.Module] = []
        inputs = self.statistics.size
        for width in hidden:
            layers += [ExactLinear(inputs, width), GroupedBatchNorm2d(width, norm_group), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, ExactLinear(inputs, dim), GroupedBatchNorm2d(dim, norm_group))

    def forward(self, lr_BCHW: torch.Tensor) -> torch.Tensor:
        x_BS = self.norm(self.statistics(lr_BCHW)).clamp(-OUTLIER, OUTLIER)
        return self.layers(x_BS).to(self.layers[0].weight.dtype)  # fp32 between the layers


class DegradationLearner(ModelMixin, ConfigMixin):
    """ResNet with basic blocks, batch normalisation and global average pooling (docs/method.md, 2.1).

    Args:
        stem: channels after the first convolution (7x7, stride 2, then max-pooling); 0 = no convolutions: the vector
            comes from statistics alone.
        widths, blocks: channels and number of blocks of each stage; from the second on a stage halves the resolution.
            The last width is the length D of the degradation vector.
        norm_group: samples that share normalisation statistics in training (`GroupedBatchNorm2d`).
        statistics: widths of the hidden layers between the picture's statistics and a vector that is added to that of
            the convolutions; empty = none (the paper).
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        stem: int = 64,
        widths: Sequence[int] = (128, 256, 512, 1024),
        blocks: Sequence[int] = (3, 4, 6, 3),
        norm_group: int = 0,
        statistics: Sequence[int] = (),
    ):
        super().__init__()
        if stem:
            self._add_convolutions(stem, widths, blocks, norm_group)
        elif not statistics or blocks or len(widths) != 1:
            raise ValueError(
                "without convolutions (stem 0) the learner needs statistics, no blocks and one width, got "
                f"{list(statistics)}, {list(blocks)}, {list(widths)}"
            )
        if statistics:
            self.statistics_network = StatisticsNetwork(statistics, self.dim, norm_group)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.gradient_checkpointing = False

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """diffusers' split of a stored configuration. ValueError for what this version no longer computes."""
        for name, value in REMOVED_KEYS.items():
            if config_dict.get(name, value) != value:
                raise ValueError(f"{name} {config_dict[name]} is of an earlier version; this one has {value} only")
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in REMOVED_KEYS}, **kwargs)

    def _add_convolutions(self, stem: int, widths: Sequence[int], blocks: Sequence[int], norm_group: int) -> None:
        if len(widths) != len(blocks):
            raise ValueError(f"widths and blocks must be equally long, got {list(widths)} and {list(blocks)}")
        self.conv = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.norm = GroupedBatchNorm2d(stem, norm_group)
        stages, channels = [], stem
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stride = 1 if stage == 0 else 2
            stages.append(
                nn.Sequential(
                    BasicBlock(channels, width, stride, norm_group),
                    *(BasicBlock(width, width, 1, norm_group) for _ in range(count - 1)),
                )
            )
            channels = width
        self.stages = nn.Sequential(*stages)

    def checkpoint_gradients(self) -> None:
        """Enable gradient checkpointing.

        Reentrant, so that only the second forward records gradients and normalisation statistics count once.
        """
        self.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))

    def blocks(self) -> Iterator[nn.Module]:
        """Parts that are compiled one by one; statistics of the picture are not among them."""
        return (part for part in self.modules() if isinstance(part, BasicBlock))

    @property
    def dim(self) -> int:
        """Length D of the degradation vector."""
        return self.config["widths"][-1]

    def forward(self, lr_BCHW: torch.Tensor, embedding: bool = False) -> torch.Tensor:
        """RGB in [0, 1] of any size to the degradation vector (B, D), or to the embedding that `embed` describes."""
        if not self.config["stem"]:
            vector_BD = self.statistics_network(lr_BCHW)
        elif not self.config["statistics"]:
            vector_BD = self._convolved(lr_BCHW)
        else:
            vector_BD = self._convolved(lr_BCHW) + self.statistics_network(lr_BCHW)
        return F.normalize(vector_BD.float(), dim=1) if embedding else vector_BD

    def _convolved(self, lr_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = F.relu(self.norm(self.conv(lr_BCHW.to(self.conv.weight.dtype))))
        x_BCHW = F.max_pool2d(x_BCHW, 3, 2, 1)
        for stage in self.stages:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BCHW = self._gradient_checkpointing_func(stage, x_BCHW)
            else:
                x_BCHW = stage(x_BCHW)
        return x_BCHW.mean((2, 3))

    def embed(self, lr_BCHW: torch.Tensor) -> torch.Tensor:
        """RGB in [0, 1] to the degradation vector, normalised to length 1, that the contrastive loss compares."""
        return self(lr_BCHW, embedding=True)
