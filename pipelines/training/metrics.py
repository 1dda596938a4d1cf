"""The metrics of a training: their numbers between two points of the curves, and the record of the points.

The record is an append-only log in parts, `OUT/metrics/ATTEMPT-STEP.jsonl`: a part holds what one group of workers
logged since its part before, one `[name, value, timestamp in ms, step]` a line. It is written before the checkpoint of
its step is committed, so a checkpoint never runs ahead of the record; a group that ends adds `ATTEMPT-end.jsonl`. Steps
that a continued training takes again are logged again under the same name and step: `recorded` gives each point once.
MLflow is a mirror of it.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

import psutil
import torch
from torch import Tensor

from pipelines.storage import Storage
from pipelines.tracking import Point
from pipelines.tracking.mirror import SYSTEM
from pipelines.training.checkpoint import committed

SMOOTHING = 0.9  # of the smoothed loss: what a new point leaves of the old mean
BUCKETS = 4  # of the timesteps
SUM, COUNT = ":sum", ":count"  # numbers whose mean is over the samples that have one, on all workers
MIB = 2**20
FOLDER = "metrics"  # of the record's parts, in OUT


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
    counts = {name.removesuffix(COUNT): value for name, value in numbers.items() if name.endswith(COUNT) and value > 0}
    return plain | {name: numbers[name + SUM] / count for name, count in counts.items()}


class Meter:
    """Collects the numbers of optimizer steps between two points of the curves.

    Args:
        samples: of an optimizer step, over all workers.
        device: whose memory is logged.
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


def record_part(points: Sequence[Point], attempt: int, step: int | None = None) -> dict[str, bytes]:
    """Path and content of a part of the record, none without points. `step`: of its checkpoint, None at the end."""
    if not points:
        return {}
    name = f"{FOLDER}/{attempt:06d}-{'end' if step is None else f'{step:08d}'}.jsonl"
    return {name: "".join(f"{json.dumps(point)}\n" for point in points).encode()}


def recorded(out: Storage, stored: Mapping[str, int] = MappingProxyType({})) -> list[Point]:
    """The points of the record, each once. Parts are left out whose steps are all `stored`: the last step, by metric,
    that whoever asks has already.
    """
    known = min((step for name, step in stored.items() if not name.startswith(SYSTEM)), default=-1)
    lines: list[str] = []
    for path in sorted(entry.path for entry in out.list(f"{FOLDER}/")):
        step = path.removesuffix(".jsonl").rpartition("-")[2]
        if not step.isdigit() or int(step) >= known:
            lines += out.read(path).decode().splitlines()
    points = [Point(*json.loads(line)) for line in lines] + _of_earlier_versions(out)
    return list({(point.name, point.step): point for point in points}.values())


def _of_earlier_versions(out: Storage) -> list[Point]:
    """Points that MLflow had not taken, in the last checkpoint and, where a process had ended, beside the model."""
    points = [point for saved in committed(out)[-1:] for point in saved.unsent]
    with suppress(FileNotFoundError):
        points = [json.loads(line) for line in out.read("unsent_metrics.jsonl").splitlines()] + points
    return [Point(*point) for point in points]
