"""Batch normalisation that does not depend on how a global batch is split over workers.

Shape suffixes: B batch, C channels, H W space.
"""

import torch
import torch.nn.functional as F
from torch import nn

from deedsr.precision import wide

MOMENTUM = 0.1  # of the running statistics, as in torch.nn.BatchNorm2d


class FullPrecisionBuffers(nn.Module):
    """Buffers follow `.to(device)` but stay fp32 when the module is cast to half precision."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class GroupedBatchNorm2d(FullPrecisionBuffers):
    """Batch normalisation over fixed groups of `norm_group` consecutive samples; 0 means the whole batch.

    In training mode every group is normalised by its own statistics, so any split of the global batch into multiples
    of `norm_group` (workers, accumulation) gives the same result. Running statistics, used in eval mode, do not move
    in forward: group means and unbiased variances add up in buffers until `commit_statistics`.

    Only forwards that record gradients are collected. That leaves out momentum encoders and evaluation, and counts a
    batch once under activation checkpointing.

    Raises ValueError in training mode when the batch is not a multiple of `norm_group`.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    # (2 C + 1): sum of group means, sum of group variances, number of groups; made by the first forward that collects
    pending: torch.Tensor | None

    def __init__(self, channels: int, norm_group: int = 0, eps: float = 1e-5):
        super().__init__()
        self.norm_group, self.eps = norm_group, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("pending", None, persistent=False)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        if not self.training:
            return F.batch_norm(x_BCHW, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        batch = len(x_BCHW)
        group = self.norm_group or batch
        if batch % group:
            raise ValueError(f"a batch of {batch} samples cannot be normalised in groups of {group}: use a multiple")
        normalised = []
        for x in x_BCHW.split(group):
            mean, var = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
            # With momentum 1 batch_norm leaves this group's mean and unbiased variance in the two tensors.
            normalised.append(F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps))
            if torch.is_grad_enabled():
                self.pending = self.sums() + torch.cat([mean, var, mean.new_ones(1)])
        return torch.cat(normalised) if len(normalised) > 1 else normalised[0]

    def sums(self) -> torch.Tensor:
        """Sums since the last commit, in fp64, so that they do not depend on the order of summation."""
        if self.pending is not None:
            return self.pending
        return wide(self.running_mean.new_zeros(2 * len(self.running_mean) + 1))


def normalizations(module: nn.Module) -> list[GroupedBatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, GroupedBatchNorm2d)]


def pending_statistics(module: nn.Module) -> torch.Tensor:
    """Sums of all normalisation layers since the last commit, fp64 (N,); all-reduce them over the workers."""
    return torch.cat([norm.sums() for norm in normalizations(module)] or [torch.zeros(0, dtype=torch.float64)])


@torch.no_grad()
def commit_statistics(module: nn.Module, reduced: torch.Tensor) -> None:
    """Once per optimizer step: move running statistics towards the mean over all groups of the global batch.

    `reduced` is `pending_statistics(module)` summed over the workers.
    """
    norms = normalizations(module)
    for norm, sums in zip(norms, reduced.split([len(n.sums()) for n in norms]), strict=True):
        groups = sums[-1]
        mean, var = (sums[:-1] / groups.clamp(min=1)).chunk(2)
        share = (MOMENTUM * (groups > 0)).to(norm.running_mean)  # not asked on the host, which would wait for the GPU
        norm.running_mean.lerp_(mean.to(norm.running_mean), share)
        norm.running_var.lerp_(var.to(norm.running_var), share)
        norm.pending = None


def drop_statistics(module: nn.Module) -> None:
    """Discard the statistics of a skipped optimizer step."""
    for norm in normalizations(module):
        norm.pending = None
