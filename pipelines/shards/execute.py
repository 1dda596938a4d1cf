"""Shards made on the cluster by Ray Data, and the pieces of a shard in nested tasks.

Workers read the plan from the output, a part at a time, so that neither the driver nor Ray holds it.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from deedsr.degradation.chain import prepare_worker
from deedsr.errors import DeeDSRError
from pipelines import cluster
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


class PlanParts:
    """A plan in files of some dozen shards each, and which of its shards are to be made."""

    def __init__(self, folder: Storage):
        self.folder = folder
        self.sources = self.shards = 0
        self.reused_sources = 0
        self.missing: list[tuple[str, list[int]]] = []  # part, its shards that are not committed
        self._names: list[str] = []

    def write(self, plans: Iterable[ShardPlan], inventory: Inventory) -> None:
        part: list[ShardPlan] = []
        for plan in plans:
            part.append(plan)
            if len(part) == _SHARDS_PER_PART:
                self._put(part, inventory)
                part = []
        if part:
            self._put(part, inventory)

    def _put(self, part: list[ShardPlan], inventory: Inventory) -> None:
        name = f"plan-{len(self._names):07d}.jsonl"
        self.folder.write(name, b"".join(plan.to_json() + b"\n" for plan in part))
        self._names.append(name)
        missing = [number for number, plan in enumerate(part) if not inventory.holds(plan)]
        if missing:
            self.missing.append((name, missing))
        self.shards += len(part)
        self.sources += sum(len(plan.sources) for plan in part)
        self.reused_sources += sum(len(plan.sources) for plan in part) - sum(len(part[n].sources) for n in missing)

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


@dataclass(frozen=True)
class _Building:
    """What makes the shards of an item, in a task or an actor."""

    folder: Storage
    work: ShardWork
    out: Storage

    def __call__(self, item: _Item) -> Iterator[Built]:
        started = time.time()
        plans = read_part(self.folder, item.part)
        for plan in (plans[number] for number in item.shards):
            record = patiently(self.work.build, plan, self.out, item.cpus)
            yield Built(plan.id, record_key(record), len(plan.sources), record.samples, started)


def build_missing(
    parts: PlanParts, work: ShardWork, out: Storage, workers: int | None, actors: WorkPlan | None = None
) -> Iterator[Built]:
    """Builds every shard that is not there; yields each as it is committed, in any order.

    `workers`: CPUs in use at a time, None for every one that the memory does for. `actors`: shards are made in actors
    of this plan, which keep their copy of `work`, because it is slow to set up.
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
        _Building(parts.folder, work, out),
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

    Pieces are taken as they are needed. `here`: `function` for those that this process makes. Elsewhere a piece whose
    process dies, and dies again, is made by `guarded` instead; then its death is an error. Raises what `function`
    raises.
    """
    here = here or function
    if cpus == 1:
        yield from map(here, pieces)
        return
    queue = _Queue[Piece, Result](pieces, _AHEAD * cpus)
    elsewhere = _elsewhere(function, guarded)
    for _ in range(cpus - 1):
        threading.Thread(target=queue.work, args=(elsewhere,), daemon=True).start()
    try:
        yield from queue.results(here)
    finally:
        queue.close()


class _Queue(Generic[Piece, Result]):
    """Pieces to take, each by one thread, and their results in order; no piece is taken `ahead` places early."""

    def __init__(self, pieces: Iterable[Piece], ahead: int):
        self._pieces, self._ahead = enumerate(pieces), ahead
        self._changed = threading.Condition()
        self._made: dict[int, Result | Exception] = {}
        self._tasks: dict[int, ObjectRef] = {}  # of pieces that are made elsewhere
        self._taken = self._given = 0
        self._closed = False  # nothing more is to be taken

    def work(self, function: Callable[..., Result]) -> None:
        """Takes pieces and has them made until there are none. `function` tells `begun` of the Ray task of a piece."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._taken < self._given + self._ahead)
                taken = self._take()
            if taken is None:
                return
            number, piece = taken
            self._make(number, piece, partial(function, begun=partial(self._tasks.__setitem__, number)))

    def results(self, function: Callable[[Piece], Result]) -> Iterator[Result]:
        """Each result in its turn; until it is there, this thread makes pieces too."""
        while True:
            with self._changed:
                there = self._given in self._made
                taken = None if there or self._taken >= self._given + self._ahead else self._take()
                if not there and taken is None and self._given == self._taken:
                    return
            if taken is not None:
                self._make(*taken, function)
            elif not there:
                self._wait()
            else:
                with self._changed:
                    result = self._made.pop(self._given)
                    self._tasks.pop(self._given, None)
                    self._given += 1
                    self._changed.notify_all()
                if isinstance(result, Exception):
                    raise result
                yield result

    def _wait(self) -> None:
        """A moment for the next result, in `ray.wait`: while the main thread of a task waits there, its CPU is free for
        the tasks that it waits for. Waits of other threads free none, and shards could wait for each other for ever."""
        import ray

        if task := self._tasks.get(self._given):
            ray.wait([task], timeout=1.0)
        with self._changed:
            self._changed.wait_for(lambda: self._given in self._made, timeout=0.02)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take(self) -> tuple[int, Piece] | None:
        taken = None if self._closed else next(self._pieces, None)
        if taken is None:
            self._closed = True
            self._changed.notify_all()
        else:
            self._taken += 1
        return taken

    def _make(self, number: int, piece: Piece, function: Callable[[Piece], Result]) -> None:
        result: Result | Exception
        try:
            result = function(piece)
        except Exception as error:  # raised in its turn
            result = error
        with self._changed:
            self._made[number] = result
            self._changed.notify_all()


def _elsewhere(function: Callable[[Piece], Result], guarded: Callable[[Piece], Result] | None) -> Callable[..., Result]:
    """`function` in a Ray task of one CPU; takes a piece and `begun`, which gets the task."""
    import ray
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

    run = ray.remote(num_cpus=1, max_retries=_RETRIES)(_made)

    def made(piece: Piece, begun: Callable[["ObjectRef"], None]) -> Result:
        def result_of(function: Callable[[Piece], Result]) -> Result | DeeDSRError:
            task = run.remote(function, piece)
            begun(task)
            return ray.get(task)

        try:
            result = result_of(function)
        except (NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError):
            if guarded is None:
                raise
            result = result_of(guarded)
        if isinstance(result, DeeDSRError):
            raise result
        return result

    return made


def _made(function: Callable[[Piece], Result], piece: Piece) -> Result | DeeDSRError:
    prepare_worker()
    try:
        return function(piece)
    except DeeDSRError as error:  # as a value: an exception would come back wrapped in Ray's traceback
        return error
