"""The numbers of a training's curves between two points of them."""

import math
import time
from collections.abc import Mapping

import psutil
import torch
from torch import Tensor

SMOOTHING = 0.9  # of the smoothed loss: what a new point leaves of the old mean
BUCKETS = 4  # of the timesteps
SUM, COUNT = ":sum", ":count"  # numbers whose mean is over the samples that have one, on all workers
MIB = 2**20


def by_timestep(loss_B: Tensor, timestep_B: Tensor, end: int) -> dict[str, Tensor]:
    """Sum and count of the losses whose timestep falls into each quarter of [0, end)."""
    bucket_B = timestep_B.clamp(max=end - 1) * BUCKETS // end
    numbers: dict[str, Tensor] = {}
    for k, name in enumerate(bucket_names(end)):
        inside_B = bucket_B == k
        numbers |= {name + SUM: loss_B.where(inside_B, 0).sum(), name + COUNT: inside_B.sum()}
    return numbers


def bucket_names(end: int) -> list[str]:
    """Metrics of the losses in each quarter of [0, end)."""
    edges = [-(-k * end // BUCKETS) for k in range(BUCKETS + 1)]
    return [f"loss_timestep/{edges[k]:03d}-{edges[k + 1] - 1:03d}" for k in range(BUCKETS)]


def middles(end: int) -> list[int]:
    """The timestep in the middle of each quarter of [0, end)."""
    return [(2 * k + 1) * end // (2 * BUCKETS) for k in range(BUCKETS)]


def means(numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers with each sum and count turned into their mean; what was never counted is left out."""
    plain = {name: value for name, value in numbers.items() if not name.endswith((SUM, COUNT))}
    for name in (name.removesuffix(COUNT) for name in numbers if name.endswith(COUNT)):
        if numbers[name + COUNT] > 0:
            plain[name] = numbers[name + SUM] / numbers[name + COUNT]
    return plain


class Meter:
    """Gathers what the optimizer steps say.

    Args:
        samples: of an optimizer step, over all workers.
        device: whose memory is told.
        smoothed: the smoothed loss of the checkpoint that the run continues from.
    """

    def __init__(self, samples: int, device: torch.device, smoothed: float | None = None):
        self.samples, self.device, self.smoothed = samples, device, smoothed
        self._sums: dict[str, float] = {}
        self._restart()

    def step(self, values: Mapping[str, float], waited: float) -> None:
        """One optimizer step: means over accumulation and workers of what the stage's loss gave; `waited`: seconds
        that it waited for data."""
        self._last = {name: value for name, value in values.items() if not name.endswith((SUM, COUNT))}
        for name, value in values.items():
            if name not in self._last and math.isfinite(values["loss"]):
                self._sums[name] = self._sums.get(name, 0.0) + value
        self._waited += waited
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The last step's numbers; means, rates and shares since the last reading; memory of this worker in MiB."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        loss = self._last["loss"]
        if math.isfinite(loss):
            self.smoothed = loss if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        values = self._last | means(self._sums) | _memory(self.device)
        values |= {
            "samples_per_second": self.samples * self._steps / seconds,
            "data_wait_share": self._waited / seconds,
        }
        if self.smoothed is not None:
            values["loss_smoothed"] = self.smoothed
        self._restart()
        return values

    def _restart(self) -> None:
        self._sums.clear()
        self._waited, self._steps, self._began = 0.0, 0, time.perf_counter()


def _memory(device: torch.device) -> dict[str, float]:
    memory = {"memory/rss_mib": psutil.Process().memory_info().rss / MIB}
    if device.type == "cuda":
        memory["memory/gpu_allocated_mib"] = torch.cuda.memory_allocated(device) / MIB
        memory["memory/gpu_peak_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return memory
