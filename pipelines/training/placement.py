"""Where a training runs: workers, CPUs, GPUs, micro-batch and threads, from an offer and the training's options."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deedsr.errors import UsageError
from pipelines.placement import NETWORK_WORKER, Offer, Plan, no_gpu, whole_cpus
from pipelines.training.config import TrainOptions, asked_micro_batch, micro_batch, worker_range

_NCCL_SHARED_MEMORY = 1 << 30  # bytes that NCCL's documentation asks for in containers
_MOST_CPUS_BESIDE_GPU = 8  # more would only wait
_MOST_LOADER_THREADS = 8
# GiB of a card from which a micro-batch of `auto` is so many times the smallest one: bf16 at Stable Diffusion's size
# takes 12.6 GB with 8 samples, and 0.9 GB for each further one (docs/measured/training.md).
_LARGER = {60: 4, 30: 2}


@dataclass(frozen=True)
class TrainingPlan(Plan):
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
        return self.workers[0]

    def __str__(self) -> str:
        fewest, most = self.workers
        count = f"{most}" if fewest == most else f"{fewest} to {most}"
        return (
            f"{count} worker{'' if most == 1 else 's'} x {self.each}, {self.backend}, "
            f"micro-batch {self.micro_batch} x {self.accumulation}, "
            f"{self.threads} + {self.loader_threads} threads (compute + loader){'; ' * bool(self.note)}{self.note}"
        )


def place_training(offer: Offer, train: TrainOptions, unit: int = 1, most: int | None = None) -> TrainingPlan:
    """Workers of a training. `unit`: samples that must stay in one forward, see `micro_batch`; `most`: of workers.

    `train.num_workers` `auto` is the most workers that the batch divides over: one GPU each, or one CPU or more.
    Raises UsageError, naming the option to change, where no worker could ever start.
    """
    gpus = int((1 if offer.gpus or not offer.local else 0) if train.gpus_per_worker is None else train.gpus_per_worker)
    if gpus and not offer.gpus and offer.growth is not None:
        raise UsageError(no_gpu(offer, "--train.gpus_per_worker 0 trains on CPUs"))
    given = worker_range(train.num_workers)
    fewest, most = given or (_most_workers(offer, train, unit, gpus, most),) * 2
    cpus = train.cpus_per_worker or _cpus_of_worker(offer, fewest, most, gpus)
    if offer.growth is not None and offer.holds(cpus, gpus) < fewest:
        raise UsageError(_too_many(offer, train, fewest, cpus, gpus))
    micro, accumulation = micro_batch(train, most, unit)
    # Another number of threads adds up in another order: with exact sums it is the same on every machine.
    threads = train.compute_threads or (1 if train.exact_sums is not False and not gpus else max(1, int(cpus)))
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


def decided(
    train: TrainOptions,
    gpus: bool,
    began: Mapping[str, Any] | None = None,
    *,
    memory: int = 0,
    workers: int = 1,
    unit: int = 1,
) -> TrainOptions:
    """`train` with what is chosen at the first start of a run and recorded with it.

    Args:
        gpus: whether it trains on GPUs.
        began: `train` of the run's record, for a continuation: it keeps what the run began with. A run of an earlier
            version has no `tf32` there, and goes on with PyTorch's own default.
        memory: bytes of the smallest card, 0 = unknown.
        workers: that a larger micro-batch leaves none idle of.
        unit: see `micro_batch`.
    """
    exact, tf32, micro = train.exact_sums, train.tf32, train.micro_batch_size
    if began is not None:
        exact = began.get("exact_sums", True) if exact is None else exact
        tf32 = began.get("tf32") if tf32 is None else tf32
        micro = began.get("micro_batch_size") if micro == "auto" else micro
    else:
        exact = not gpus if exact is None else exact
        tf32 = not exact if tf32 is None else tf32
    if micro == "auto":
        smallest = asked_micro_batch(train, unit) or 1
        fitting = [smallest * times for least, times in _LARGER.items() if memory >= least * 2**30]
        whole = [size for size in fitting if train.global_batch_size % (size * workers) == 0]
        micro = max(whole, default=smallest)
    return replace(train, exact_sums=exact, tf32=tf32, micro_batch_size=micro)


def arithmetic(train: TrainOptions) -> str:
    """Precision of a training on GPUs, for the line that says where it runs."""
    tf32 = {True: " with TF32", False: " without TF32", None: ""}[train.tf32]
    return f"{train.precision}{tf32 if train.precision == 'fp32' else ''}{', exact sums' if train.exact_sums else ''}"


def _most_workers(offer: Offer, train: TrainOptions, unit: int, gpus: int, most: int | None) -> int:
    if gpus:
        limit = train.global_batch_size if offer.answers else max(1, offer.gpus)
    else:
        each = train.cpus_per_worker or 1
        limit = offer.within_memory(max(1, offer.holds(each, 0)), NETWORK_WORKER)
    # Micro-batches that are given stay whole: rounding is then the same for any number of workers.
    parts = train.global_batch_size // min(asked_micro_batch(train, unit) or 1, train.global_batch_size)
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
        shares = [whole_cpus(nodes.cpus / nodes.gpus) for nodes in offer.all_nodes if nodes.gpus >= 1]
        return min(min(shares, default=1.0), _MOST_CPUS_BESIDE_GPU)
    for workers in range(most, fewest - 1, -1):
        for cpus in range(offer.cpus // workers, 0, -1):
            if offer.holds(cpus, 0) >= workers:
                return float(cpus)
    return 1.0


def _too_many(offer: Offer, train: TrainOptions, workers: int, cpus: float, gpus: int) -> str:
    shapes = [nodes for nodes in offer.all_nodes if nodes.gpus >= gpus]
    if train.cpus_per_worker and all(nodes.cpus < cpus for nodes in shapes):
        largest = max((nodes.cpus for nodes in shapes), default=0)
        node = f"node{' with a GPU' if gpus else ''} of {offer.name}"
        return f"train.cpus_per_worker {cpus:g}: no {node} has more than {largest:g}: ask for fewer"
    given = f" with train.cpus_per_worker {cpus:g}" if train.cpus_per_worker else ""
    kinds: dict[str, tuple[float, int]] = {"GPUs": (workers, offer.gpus)} if gpus else {}
    if train.cpus_per_worker or not gpus:
        kinds["CPUs"] = (workers * cpus, offer.cpus)
    needs, has = (" and ".join(f"{kinds[kind][i]:g} {kind}" for kind in kinds) for i in range(2))
    at_most = " at most" if offer.growth else ""
    return f"train.num_workers {train.num_workers}{given} needs {needs}, {offer.name} has {has}{at_most}: ask for fewer"


def _idle(gpus: int, idle: int, train: TrainOptions, micro: int, unit: int) -> str:
    """What is left idle, and the option that would use it."""
    smaller = [m for m in range(micro - 1, 0, -1) if _divides(replace(train, micro_batch_size=m), gpus, unit)]
    if smaller:
        option = f"--train.micro_batch_size {min(smaller[0], train.global_batch_size // gpus)}"
    else:
        option = f"--train.global_batch_size {micro * gpus * -(-train.global_batch_size // (micro * gpus))}"
    return f"{idle} of {gpus} GPUs idle: {option} would use them all"
