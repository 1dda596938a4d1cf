"""Gradients of a global batch that are the same to the last bit on any number of workers.

The gradients of the micro-batches are float32 numbers (or bfloat16). Their sums in float64 are exact unless exponents
lie more than 25 apart, so the order of summation leaves no trace after the one rounding to float32 at the end. In
float32 another order differs by a rounding error, which moves a ReLU across its kink somewhere, and within fifty steps
that grows to percents of the loss.

Shape suffixes: N elements of all parameters that train.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ExactSum:
    """Sums what every backward leaves at `parameters`, micro-batch after micro-batch; 8 bytes per element.

    The losses must not be divided by the number of micro-batches: that division is rounded, `mean` makes it once.
    """

    def __init__(self, parameters: list[nn.Parameter], shapes: list[torch.Size], device: torch.device):
        sizes = [shape.numel() for shape in shapes]
        self._sum_N = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self._parts = [part.view(shape) for part, shape in zip(self._sum_N.split(sizes), shapes, strict=True)]
        for parameter, part in zip(parameters, self._parts, strict=True):
            parameter.register_hook(partial(_add, part))

    def mean(self, micro_batches: int, clip: float = 0.0) -> tuple[list[Tensor], float]:
        """Mean gradients over `micro_batches` of all workers, float64, with norm `clip` at most (0: any), and the norm
        before clipping. A collective, to be called once per optimizer step; the tensors hold until `clear`.
        """
        if dist.get_world_size() > 1:
            dist.all_reduce(self._sum_N)
        norm = float(self._sum_N.div_(micro_batches).norm())
        if 0 < clip < norm:
            self._sum_N.mul_(clip / norm)
        return self._parts, norm

    def clear(self) -> None:
        self._sum_N.zero_()


def _add(total: Tensor, gradient: Tensor) -> None:
    total.add_(gradient)
