"""Where work runs: from what a machine or a cluster offers and what a command asks for to workers, CPUs, GPUs, device.

Pure functions; `pipelines.cluster.offer` asks the cluster. A plan says itself in one line, which the commands log
before they start. The default is a GPU for every worker: on one machine where it has GPUs, on a cluster always,
because GPU nodes may only start once something waits for them.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from deedsr.errors import UsageError
from pipelines.training.config import TrainOptions, micro_batch, worker_range

Device = Literal["auto", "cpu", "cuda", "mps"]

SHARD_WORKER = 500_000_000  # bytes of a process that makes shards, with the torch that webdataset imports
NETWORK_WORKER = 1_500_000_000  # bytes of a process that computes networks of `tiny`'s size on a CPU
_MEMORY_SHARE = 0.6  # of a machine's memory that workers may take, by these sizes
_NCCL_SHARED_MEMORY = 1 << 30  # bytes that NCCL's documentation asks for in containers
_MOST_CPUS_BESIDE_GPU = 8  # more would only wait
_MOST_LOADER_THREADS = 8


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

    `growth`: () = nothing, None = an autoscaler whose node types are not known. `answers`: it says which requests
    none of them holds, so that much can be asked for. `memory`, `shared_memory` (free): bytes, of a single machine.
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


@dataclass(frozen=True)
class TrainingPlan:
    """Where a training runs. `workers`: fewest and most."""

    workers: tuple[int, int]
    cpus: float  # of each worker
    gpus: int  # of each worker, 0 or 1
    micro_batch: int  # samples per forward, with the most workers
    accumulation: int  # forwards per optimizer step of one worker, with the most workers
    threads: int  # that compute, of each worker
    loader_threads: int  # of each worker
    note: str = ""

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def backend(self) -> str:
        return "nccl" if self.gpus else "gloo"

    @property
    def fewest(self) -> int:
        """Workers without which there is no beginning."""
        return self.workers[0]

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        return {"CPU": self.cpus} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def __str__(self) -> str:
        fewest, most = self.workers
        each = f"{self.gpus} GPU and {_cpus(self.cpus)}" if self.gpus else f"{_cpus(self.cpus)}, no GPU"
        threads = f"{self.threads} + {self.loader_threads} threads (compute + loader)"
        return (
            f"{_count(fewest, most, 'worker')} x {each}, {self.backend}, "
            f"micro-batch {self.micro_batch} x {self.accumulation}, {threads}"
        ) + (f"; {self.note}" if self.note else "")


@dataclass(frozen=True)
class WorkPlan:
    """Where tasks or actors run that work side by side on parts of the input."""

    workers: int  # at most, at a time
    cpus: float  # of each
    gpus: int = 0  # of each, 0 or 1
    device: Device = "cpu"

    @property
    def fewest(self) -> int:
        """Workers without which there is no beginning."""
        return 1

    @property
    def bundle(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def __str__(self) -> str:
        each = f"{self.gpus} GPU and {_cpus(self.cpus)}" if self.gpus else f"{_cpus(self.cpus)}, no GPU"
        if self.device == "mps":
            each = f"{_cpus(self.cpus)}, MPS"
        return f"{_count(self.workers, self.workers, 'worker')} x {each}"


def place_training(offer: Offer, train: TrainOptions, unit: int = 1, most: int | None = None) -> TrainingPlan:
    """Workers of a training. `unit`: samples that must stay in one forward, see `micro_batch`; `most`: of workers.

    `train.num_workers` `auto` is the most workers that the batch divides over: one GPU each, or one CPU or more.
    Raises UsageError, naming the option to change, where no worker could ever start.
    """
    gpus = _gpus_per_worker(offer, train.gpus_per_worker)
    if gpus and not offer.gpus and offer.growth is not None:
        raise UsageError(_no_gpu(offer, "--train.gpus_per_worker 0 trains on CPUs"))
    given = worker_range(train.num_workers)
    fewest, most = given or (_most_workers(offer, train, unit, gpus, most),) * 2
    cpus = train.cpus_per_worker or _cpus_of_worker(offer, fewest, most, gpus)
    if offer.growth is not None and offer.holds(cpus, gpus) < fewest:
        raise UsageError(_too_many(offer, train, fewest, cpus, gpus))
    micro, accumulation = micro_batch(train, most, unit)
    # Another number of threads adds up in another order: with exact sums it is the same on every machine.
    threads = train.compute_threads or (1 if train.exact_sums and not gpus else max(1, int(cpus)))
    loader_threads = train.loader_threads or min(_MOST_LOADER_THREADS, max(2, int(cpus)))
    plan = TrainingPlan((fewest, most), cpus, gpus, micro, accumulation, threads, loader_threads)
    notes = []
    if gpus and not given and offer.gpus > most:
        notes.append(_idle(offer.gpus, offer.gpus - most, train, micro, unit))
    if not gpus and offer.gpus:
        notes.append(f"{offer.gpus} GPUs idle (train.gpus_per_worker is 0)")
    if gpus and most > 1 and offer.shared_memory is not None and offer.shared_memory < _NCCL_SHARED_MEMORY:
        notes.append(
            f"/dev/shm has {offer.shared_memory / 2**20:.0f} MiB free, NCCL may need 1 GiB between GPUs: start the "
            "container with --ipc=host or --shm-size=1g"
        )
    return replace(plan, note="; ".join(notes))


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
        raise UsageError(_no_gpu(offer, f"--device cpu runs `{command}` on CPUs"))
    shapes = [nodes for nodes in offer.all_nodes if nodes.gpus >= 1]
    cpus = min([min(1.0, _rounded(0.5 * nodes.cpus / nodes.gpus)) for nodes in shapes], default=1.0)
    return WorkPlan(workers or max(1, offer.gpus), cpus, 1, "cuda")


def place_shards(offer: Offer, workers: int | None) -> WorkPlan:
    """Tasks of one CPU each that make shards. `workers`: at a time, None = every CPU that the memory does for."""
    return WorkPlan(workers or offer.within_memory(max(1, offer.cpus), SHARD_WORKER), 1.0)


def _gpus_per_worker(offer: Offer, wanted: float | None) -> int:
    if wanted is None:
        return 1 if offer.gpus or not offer.local else 0
    return int(wanted)


def _most_workers(offer: Offer, train: TrainOptions, unit: int, gpus: int, most: int | None) -> int:
    if gpus:
        limit = train.global_batch_size if offer.answers else max(1, offer.gpus)
    else:
        each = train.cpus_per_worker or 1
        limit = offer.within_memory(max(1, offer.holds(each, 0)), NETWORK_WORKER)
    # Micro-batches that are given stay whole: rounding is then the same for any number of workers.
    parts = train.global_batch_size // min(train.micro_batch_size or 1, train.global_batch_size)
    for workers in range(min(limit, parts, most or parts), 0, -1):
        if _divides(train, workers, unit):
            return workers
    micro_batch(train, 1, unit)  # says why
    raise AssertionError


def _divides(train: TrainOptions, workers: int, unit: int) -> bool:
    try:
        micro_batch(train, workers, unit)
    except UsageError:
        return False
    return True


def _cpus_of_worker(offer: Offer, fewest: int, most: int, gpus: int) -> float:
    """The most CPUs that each of the workers can have."""
    if gpus:
        shares = [_rounded(nodes.cpus / nodes.gpus) for nodes in offer.all_nodes if nodes.gpus >= 1]
        return min(min(shares, default=1.0), _MOST_CPUS_BESIDE_GPU)
    for workers in range(most, fewest - 1, -1):
        for cpus in range(offer.cpus // workers, 0, -1):
            if offer.holds(cpus, 0) >= workers:
                return float(cpus)
    return 1.0


def _rounded(cpus: float) -> float:
    """Whole CPUs where there is one or more, else down to what Ray can count."""
    return float(math.floor(cpus)) if cpus >= 1 else math.floor(cpus * 1000) / 1000


def _no_gpu(offer: Offer, remedy: str) -> str:
    grows = "its autoscaler has no node type with one" if offer.grows else "no autoscaler that could add one"
    lacks = "has no GPU" if offer.local else f"has no GPU and {grows}"
    return f"{offer.name} {lacks}: {remedy}"


def _too_many(offer: Offer, train: TrainOptions, workers: int, cpus: float, gpus: int) -> str:
    shapes = [nodes for nodes in offer.all_nodes if nodes.gpus >= gpus]
    if train.cpus_per_worker and all(nodes.cpus < cpus for nodes in shapes):
        largest = max((nodes.cpus for nodes in shapes), default=0)
        node = f"node{' with a GPU' if gpus else ''} of {offer.name}"
        return f"train.cpus_per_worker {cpus:g}: no {node} has more than {largest:g}: ask for fewer"
    given = f" with train.cpus_per_worker {cpus:g}" if train.cpus_per_worker else ""
    needs, has = [], []
    if gpus:
        needs, has = [f"{workers} GPUs"], [f"{offer.gpus} GPUs"]
    if train.cpus_per_worker or not gpus:
        needs, has = [*needs, f"{workers * cpus:g} CPUs"], [*has, f"{offer.cpus} CPUs"]
    return (
        f"train.num_workers {train.num_workers}{given} needs {' and '.join(needs)}, {offer.name} has "
        f"{' and '.join(has)}{' at most' if offer.growth else ''}: ask for fewer"
    )


def _idle(gpus: int, idle: int, train: TrainOptions, micro: int, unit: int) -> str:
    """What is left idle, and the option that would use it."""
    smaller = [m for m in range(micro - 1, 0, -1) if _divides(replace(train, micro_batch_size=m), gpus, unit)]
    if smaller:
        option = f"--train.micro_batch_size {min(smaller[0], train.global_batch_size // gpus)}"
    else:
        option = f"--train.global_batch_size {micro * gpus * -(-train.global_batch_size // (micro * gpus))}"
    return f"{idle} of {gpus} GPUs idle: {option} would use them all"


def _cpus(cpus: float) -> str:
    return f"{cpus:g} CPU" + ("" if cpus == 1 else "s")


def _count(fewest: int, most: int, noun: str) -> str:
    return (f"{fewest}" if fewest == most else f"{fewest} to {most}") + f" {noun}" + ("" if most == 1 else "s")
