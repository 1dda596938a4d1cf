"""Where work runs: from what a machine or cluster offers and a command needs to workers, CPUs, GPUs and device.

Pure functions; `pipelines.cluster.offer` queries the cluster, `pipelines.training.placement` places trainings. `str` of
a plan is one line, which the commands log before they start. The default is a GPU for every worker: on one machine
where it has GPUs, on a cluster always, because GPU nodes may only start once something waits for them.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from deedsr.errors import UsageError

Device = Literal["auto", "cpu", "cuda", "mps"]

SHARD_WORKER = 500_000_000  # bytes of a process that makes shards, with the torch that webdataset imports
NETWORK_WORKER = 1_500_000_000  # bytes of a process that computes networks of `tiny`'s size on a CPU
_MEMORY_SHARE = 0.6  # of a machine's memory that workers may take, by these sizes


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind."""

    cpus: float  # of each
    gpus: float = 0
    count: int = 1

    def holds(self, cpus: float, gpus: float) -> int:
        """How many workers of that size these nodes hold together."""
        if (cpus and self.cpus < cpus) or (gpus and self.gpus < gpus) or not (cpus or gpus):
            return 0
        sizes = [(self.cpus, cpus), (self.gpus, gpus)]
        return self.count * min(math.floor(have / need + 1e-9) for have, need in sizes if need)


@dataclass(frozen=True)
class Offer:
    """What there is, and what an autoscaler may add to it.

    `growth`: () = nothing, None = an autoscaler whose node types are not known. `answers`: it reports requests that
    none of them holds, so that as many workers as the batch allows can be requested. `memory`, `shared_memory` (free):
    bytes, of a single machine.
    """

    nodes: tuple[Nodes, ...]
    growth: tuple[Nodes, ...] | None = ()
    local: bool = False
    memory: int | None = None
    shared_memory: int | None = None
    answers: bool = False

    @property
    def grows(self) -> bool:
        return self.growth is None or bool(self.growth)

    @property
    def all_nodes(self) -> tuple[Nodes, ...]:
        return self.nodes + (self.growth or ())

    @property
    def gpus(self) -> int:
        """GPUs that there are or that are known to start on demand."""
        return sum(int(nodes.gpus) * nodes.count for nodes in self.all_nodes)

    @property
    def cpus(self) -> int:
        return sum(int(nodes.cpus) * nodes.count for nodes in self.all_nodes)

    def holds(self, cpus: float, gpus: float) -> int:
        return sum(nodes.holds(cpus, gpus) for nodes in self.all_nodes)

    @property
    def name(self) -> str:
        return "this machine" if self.local else "this cluster"

    def within_memory(self, workers: int, each: int) -> int:
        """At most so many workers of `each` bytes, where the memory is known; 1 at least."""
        if self.memory is None:
            return workers
        return max(1, min(workers, int(self.memory * _MEMORY_SHARE / each)))


class Plan(ABC):
    """Where workers run that each have as many CPUs and GPUs."""

    cpus: float  # of each worker
    gpus: int  # of each worker, 0 or 1

    @property
    @abstractmethod
    def fewest(self) -> int:
        """Workers without which there is no beginning."""

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        return {"CPU": self.cpus} | ({"GPU": float(self.gpus)} if self.gpus else {})

    @property
    def each(self) -> str:
        """`bundle` as text."""
        cpus = f"{self.cpus:g} CPU" + ("" if self.cpus == 1 else "s")
        return f"{self.gpus} GPU and {cpus}" if self.gpus else f"{cpus}, no GPU"


@dataclass(frozen=True)
class WorkPlan(Plan):
    """Where tasks or actors run that work side by side on parts of the input."""

    workers: int  # at most, at a time
    cpus: float
    gpus: int = 0
    device: Device = "cpu"

    @property
    def fewest(self) -> int:
        return 1

    def __str__(self) -> str:
        each = self.each.replace("no GPU", "MPS") if self.device == "mps" else self.each
        return f"{self.workers} worker{'' if self.workers == 1 else 's'} x {each}"


def place_networks(offer: Offer, device: Device, workers: int | None, command: str) -> WorkPlan:
    """Processes that each hold networks and compute on a part of the input: latents, upscaling, evaluation.

    `device`: `auto` = a GPU for each; on a machine without any, CPUs. `mps` = Apple's GPU. `workers`: at a time, None =
    one on every GPU, or every CPU where the device is the CPU. Raises UsageError where none could ever start.
    """
    if device == "mps":
        if not offer.local:
            raise UsageError(f"--device mps is for a single machine: leave it out to run `{command}` on {offer.name}")
        return WorkPlan(workers or 1, 0.5, device="mps")
    if device == "cpu" or (device == "auto" and offer.local and not offer.gpus):
        most = offer.within_memory(max(1, offer.cpus), NETWORK_WORKER)
        if offer.growth == () and offer.cpus < 1:
            raise UsageError(f"{offer.name} has no CPU for {command}: start nodes with CPUs")
        # Half a CPU each: an actor for every CPU leaves room for the tasks that feed them.
        return WorkPlan(workers or most, 0.5)
    if not offer.gpus and offer.growth is not None:
        raise UsageError(no_gpu(offer, f"--device cpu runs `{command}` on CPUs"))
    shapes = [nodes for nodes in offer.all_nodes if nodes.gpus >= 1]
    cpus = min([min(1.0, whole_cpus(0.5 * nodes.cpus / nodes.gpus)) for nodes in shapes], default=1.0)
    return WorkPlan(workers or max(1, offer.gpus), cpus, 1, "cuda")


def place_shards(offer: Offer, workers: int | None) -> WorkPlan:
    """Tasks of one CPU each that make shards. `workers`: at a time, None = every CPU, as far as the memory suffices."""
    return WorkPlan(workers or offer.within_memory(max(1, offer.cpus), SHARD_WORKER), 1.0)


def whole_cpus(cpus: float) -> float:
    """Whole CPUs where there is one or more, else down to what Ray can count."""
    return float(math.floor(cpus)) if cpus >= 1 else math.floor(cpus * 1000) / 1000


def no_gpu(offer: Offer, remedy: str) -> str:
    grows = "its autoscaler has no node type with one" if offer.grows else "no autoscaler that could add one"
    lacks = "has no GPU" if offer.local else f"has no GPU and {grows}"
    return f"{offer.name} {lacks}: {remedy}"
