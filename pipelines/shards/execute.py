"""Shards made on the cluster by Ray Data.

Workers read the plan from the output, a part at a time, so that neither the driver nor Ray holds it.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pipelines import cluster
from pipelines.distribution import distribute, parts_per_item
from pipelines.placement import NETWORK_WORKER, SHARD_WORKER, WorkPlan, place_shards
from pipelines.shards.plan import ShardPlan
from pipelines.shards.shard import Inventory, ShardRecord, record_key
from pipelines.storage import Storage
from pipelines.storage.waiting import patiently

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
