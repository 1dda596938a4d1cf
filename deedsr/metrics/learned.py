"""Base of metrics that compute features with a frozen network."""

from abc import abstractmethod
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deedsr.metrics.metric import Metric
from deedsr.metrics.weights import WeightsFile, load_into, locate, read_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["LearnedMetric", "shipped_tensors"]


class LearnedMetric(Metric):
    """A metric with a frozen network, which is loaded once for each object."""

    @abstractmethod
    def network(self) -> "tuple[nn.Module, WeightsFile]":
        """The network before its weights are loaded, and the file that holds them."""

    @cached_property
    def _loaded(self) -> "tuple[nn.Module, str]":
        network, file = self.network()
        path = locate(file, self.name, self.setting.weights)
        digest = load_into(network, path)
        return network.to(self.setting.device), f"weights {Path(file.name).stem}, tensors' SHA-256 {digest}"

    def prepare(self) -> None:
        _ = self._loaded

    def statement(self) -> str:
        """With the weights that were loaded, if they were."""
        loaded = self.__dict__.get("_loaded")
        return super().statement() + (f"; {loaded[1]}" if loaded else "")

    def compute(self, pictures_BCHW: "Tensor") -> Any:
        """What the network gives for pictures on the metric's device."""
        import torch

        with torch.inference_mode():
            return self._loaded[0](pictures_BCHW)

    def tensor(self, *pictures: np.ndarray) -> "Tensor":
        """Pictures of one size as a float32 tensor (B, 3, H, W) in 0..1."""
        import torch

        sizes = {picture.shape for picture in pictures}
        if len(sizes) != 1:
            raise ValueError(f"{self.name} compares pictures of one size, got {' and '.join(map(str, sorted(sizes)))}")
        return torch.from_numpy(np.stack(pictures)).to(self.setting.device).permute(0, 3, 1, 2).float() / 255


def shipped_tensors(name: str) -> "dict[str, Tensor]":
    """Tensors of a small file beside this module."""
    with as_file(files("deedsr.metrics") / name) as path:
        return read_tensors(path)
