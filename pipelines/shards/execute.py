"""Shards made on the cluster by Ray Data, and the pieces of a shard in nested tasks.

Workers read the plan from the output, a part at a time, so that neither the driver nor Ray holds it.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from deedsr.dataset.manifest import HRSource, LatentsSource
from deedsr.dataset.recipe import Recipe
from deedsr.degradation.chain import prepare_worker
from deedsr.errors import DeeDSRError
from pipelines import cluster
from pipelines.data.dataset import Dataset
from pipelines.distribution import distribute, parts_per_item
from pipelines.placement import NETWORK_WORKER, SHARD_WORKER, WorkPlan, place_shards
from pipelines.shards.plan import ShardPlan
from pipelines.shards.shard import Inventory, ShardRecord, record_key
from pipelines.storage import Storage
from pipelines.storage.waiting import patiently

if TYPE_CHECKING:
    from ray import ObjectRef

logger = logging.getLogger(__name__)
_SHARDS_PER_PART = 64


class ShardWork(Protocol):
    """What turns plans into shards. Pickles: it travels to the workers."""

    def build(self, plan: ShardPlan, out: Storage, cpus: int = 1) -> ShardRecord:
        """Writes the tar of a plan, then its record. Equal plan, equal bytes, wherever and whenever.

        `cpus`: those of the cluster that the work may use at a time; it may leave them.
        """


@dataclass(frozen=True)
class Job:
    """A dataset to be made in `out`: what its shards are and what builds them.

    `made_of`: the dataset whose shards they are made of, None for shards of sources.
    """

    plans: Callable[[], Iterable[ShardPlan]]
    work: ShardWork
    out: Storage
    recipe: Recipe
    made_of: Dataset | None = None
    hr_from: HRSource | None = None
    latents: LatentsSource | None = None


class PlanParts:
    """A plan in files of some dozen shards each, and which of its shards are to be made."""

    def __init__(self, folder: Storage):
        self.folder = folder
        self.sources = self.shards = 0
        self.reused_sources = 0
        self.missing: list[tuple[str, list[int]]] = []  # part, its shards that are not committed
        self._names: list[str] = []

    def write(self, plans: Iterable[ShardPlan], inventory: Inventory) -> None:
        rest = iter(plans)
        while part := list(islice(rest, _SHARDS_PER_PART)):
            name = f"plan-{len(self._names):07d}.jsonl"
            self.folder.write(name, b"".join(plan.to_json() + b"\n" for plan in part))
            self._names.append(name)
            missing = [number for number, plan in enumerate(part) if not inventory.holds(plan)]
            if missing:
                self.missing.append((name, missing))
            sources = sum(len(plan.sources) for plan in part)
            self.shards += len(part)
            self.sources += sources
            self.reused_sources += sources - sum(len(part[number].sources) for number in missing)

    @property
    def missing_shards(self) -> int:
        return sum(len(shards) for _, shards in self.missing)

    def __iter__(self) -> Iterator[ShardPlan]:
        for name in self._names:
            yield from read_part(self.folder, name)


def read_part(folder: Storage, name: str) -> list[ShardPlan]:
    return [ShardPlan.from_json(line) for line in folder.read(name).splitlines()]


class Built(NamedTuple):
    """One committed shard. `key`: see `record_key`."""

    id: str
    key: tuple[str, int]
    sources: int
    samples: int
    started: float  # seconds since the epoch


class _Item(NamedTuple):
    """A few shards of one part of the plan. `cpus`: for each of them."""

    part: str
    shards: list[int]
    cpus: int = 1


def _built(folder: Storage, work: ShardWork, out: Storage, item: _Item) -> Iterator[Built]:
    """Makes the shards of an item, in a task or an actor."""
    started = time.time()
    plans = read_part(folder, item.part)
    for plan in (plans[number] for number in item.shards):
        record = patiently(work.build, plan, out, item.cpus)
        yield Built(plan.id, record_key(record), len(plan.sources), record.samples, started)


def build_missing(parts: PlanParts, job: Job, workers: int | None, actors: WorkPlan | None = None) -> Iterator[Built]:
    """Builds every shard that is not there; yields each as it is committed, in any order.

    `workers`: CPUs in use at a time, None for every one that the memory does for. `actors`: shards are made in actors
    of this plan, which keep their copy of the work, because it is slow to set up.
    """
    count = parts.missing_shards
    if not count:
        return iter(())
    cluster.connect()
    offer = cluster.offer()
    plan = actors or place_shards(offer, workers)
    if actors is None:
        logger.info("shards: %s", plan)
        cluster.wait_for(plan, "")
    size = parts_per_item(count, plan.workers)
    items = [
        _Item(name, shards[start : start + size])
        for name, shards in parts.missing
        for start in range(0, len(shards), size)
    ]
    if actors is None and count < plan.workers:  # an item is a shard then
        shares = _shares(_sizes(parts), plan.workers)
        items = [item._replace(cpus=cpus) for item, cpus in zip(items, shares, strict=True)]
    memory = plan.workers * (NETWORK_WORKER if actors else SHARD_WORKER) / 1e9
    less = "fewer --workers or a smaller --batch-size need less" if actors else "fewer --workers need less"
    return distribute(
        partial(_built, parts.folder, job.work, job.out),
        items,
        actors=actors,
        # On a cluster that grows, what its autoscaler adds takes part.
        tasks=plan.workers if workers or offer.local else None,
        failure="making shards failed",
        less=f"{plan.workers} workers take about {memory:.1f} GB; {less}",
        again="run the same command again, it reuses what is done",
    )


def _sizes(parts: PlanParts) -> list[int]:
    """Sources of each missing shard; 1 where it is made of a shard."""
    plans = ((read_part(parts.folder, name), shards) for name, shards in parts.missing)
    return [max(1, len(part[number].sources)) for part, shards in plans for number in shards]


def _shares(sizes: list[int], cpus: int) -> list[int]:
    """CPUs for each of as many shards, or fewer: one more for the slowest, until there are none."""
    shares = [1] * len(sizes)
    for _ in range(cpus - len(sizes)):
        slowest = max(range(len(sizes)), key=lambda shard: sizes[shard] / shares[shard])
        shares[slowest] += 1
    return shares


# The pieces of one shard on several CPUs at a time: some made here, the others in nested Ray tasks, all in order.
# Processes and not threads, because a fifth of the work holds Python's lock; tasks of Ray and not processes of our own,
# because the CPUs may be on other nodes, and because Ray ends its processes with the job.

_AHEAD = 2  # pieces for each CPU that are in work or wait for an earlier one
_RETRIES = 1  # of a piece whose process dies; without any, Ray would kill the shard's own task where memory is short

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Piece], Result],
    pieces: Iterable[Piece],
    cpus: int,
    *,
    here: Callable[[Piece], Result] | None = None,
    guarded: Callable[[Piece], Result] | None = None,
) -> Iterator[Result]:
    """`function` of each piece, in order; `cpus` of them at a time: one in this process, the others in Ray tasks.

    Pieces are taken as they are needed, on this thread. `here`: `function` for those that this process makes. Elsewhere
    a piece whose process dies, and dies again, is made by `guarded` instead; then its death is an error. Raises what
    `function` raises.
    """
    here = here or function
    if cpus == 1:
        yield from map(here, pieces)
        return
    import ray
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

    run: Any = ray.remote(num_cpus=1, max_retries=_RETRIES)(_made)
    tasks: dict[int, ObjectRef] = {}  # of pieces that are made elsewhere
    this_process = threading.Lock()

    def elsewhere(function: Callable[[Piece], Result], number: int, piece: Piece) -> Result | DeeDSRError:
        tasks[number] = run.remote(function, piece)
        return ray.get(tasks[number])

    def make(number: int, piece: Piece) -> Result:
        if this_process.acquire(blocking=False):
            try:
                return here(piece)
            finally:
                this_process.release()
        try:
            result = elsewhere(function, number, piece)
        except (NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError):
            if guarded is None:
                raise
            result = elsewhere(guarded, number, piece)
        if isinstance(result, DeeDSRError):
            raise result
        return result

    rest, places, pool = enumerate(pieces), count(), ThreadPoolExecutor(cpus)
    try:
        begun = deque(pool.submit(make, *piece) for piece in islice(rest, _AHEAD * cpus))
        while begun:
            number = next(places)
            while not begun[0].done():
                # While the main thread of a task waits in `ray.wait`, its CPU is free for the tasks that it waits for.
                # Waits of other threads free none, and shards could wait for each other for ever.
                if task := tasks.get(number):
                    ray.wait([task], timeout=1.0)
                wait([begun[0]], timeout=0.02)
            tasks.pop(number, None)
            result = begun.popleft().result()
            begun.extend(pool.submit(make, *piece) for piece in islice(rest, 1))
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _made(function: Callable[[Piece], Result], piece: Piece) -> Result | DeeDSRError:
    prepare_worker()
    try:
        return function(piece)
    except DeeDSRError as error:  # as a value: an exception would come back wrapped in Ray's traceback
        return error
