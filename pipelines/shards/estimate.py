"""What a shards job will make and cost: counted from the listing, measured on a few of its sources."""

import heapq
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import cv2
from tqdm import tqdm

from deedsr.dataset.keys import generator
from deedsr.dataset.pictures import RejectedImage
from deedsr.dataset.recipe import Recipe
from pipelines.machine import this_machine
from pipelines.reports.tables import bytes_text, count_text, duration_text
from pipelines.shards.listing import listed
from pipelines.shards.plan import ShardPlan, plan_shards
from pipelines.shards.samples import samples_of
from pipelines.shards.shard import Inventory
from pipelines.shards.source import Source, read_source
from pipelines.storage import open_storage

_PROBED = 16  # sources measured
_PROBE_SECONDS = 30.0  # after which the probe ends with what it has
EFFICIENCY = 0.9  # of many cores against as many times one


@dataclass
class Estimate:
    """Result of `deedsr shards --plan`. Times and bytes are those of the missing shards."""

    sources: int
    shards: int
    shards_to_make: int
    samples: int  # to make, expected
    samples_error: int  # one standard error of that, from the spread over the probed sources
    read_bytes: int
    written_bytes: int
    probed_sources: int
    samples_per_second: float  # one core, reading included
    cores: int  # in all
    nodes: int
    hours: float
    cost: float | None

    def text(self) -> str:
        """For people."""
        listed = f"{count_text(self.sources)} sources in {count_text(self.shards)} shards"
        if not self.shards_to_make:
            return f"nothing to do: {listed}, and all of them are there"
        make = "all" if self.shards_to_make == self.shards else count_text(self.shards_to_make)
        error = f", give or take {count_text(self.samples_error)}" if self.samples_error else ""
        machines = f"{count_text(self.nodes)} machine{'s' if self.nodes > 1 else ''}"
        cores = f"{count_text(self.cores)} core{'s' if self.cores > 1 else ''}"
        speed = f"{self.samples_per_second:.3g} samples/s a core, measured on {self.probed_sources} sources"
        lines = {
            "sources": f"{listed}, {make} to be made",
            "samples": f"{count_text(self.samples)} to make{error}",
            "read": bytes_text(self.read_bytes),
            "written": bytes_text(self.written_bytes),
            "time": f"{duration_text(3600 * self.hours)} on {machines} with {cores} in all ({speed})",
        }
        if self.cost is not None:
            lines["cost"] = f"{self.cost:,.2f}"
        return "\n".join(f"{name:<7}  {value}" for name, value in lines.items())


def estimate(
    sources: Sequence[str],
    out: str,
    recipe: Recipe,
    *,
    pairs: Sequence[str] = (),
    nodes: int = 1,
    cores: int | None = None,
    price: float | None = None,
    progress: bool = True,
) -> Estimate:
    """Plans the job without making anything, and makes the samples of a few sources in memory to measure them.

    Duplicates are not looked for: that reads everything. `cores`: of each node, None for as many as here. `price`: of a
    node, per hour.
    """
    inventory = Inventory.of(open_storage(out))
    count = _Count()
    listing = plan_shards(listed(sources, pairs, recipe.scale), recipe)
    plans = tqdm(listing, unit="shard", desc="plan", disable=not progress, leave=False)
    # A few sources, each as likely, the same ones every time.
    rng = generator("probe", recipe.seed)
    drawn = ((rng.random(), number, source) for number, source in enumerate(count.missing(plans, inventory)))
    probed = _probed([source for _, _, source in heapq.nsmallest(_PROBED, drawn)], recipe, progress)
    made, sizes, durations = zip(*probed, strict=True) if probed else ((0,), (0,), (0.0,))
    deviation = stdev(made) / math.sqrt(len(made)) if len(made) > 1 else 0.0
    per_second = sum(made) / sum(durations) if probed else 0.0
    cores = cores or this_machine().cpus
    seconds = mean(durations) * count.sources_of_a_core(cores * nodes)
    return Estimate(
        sources=count.sources,
        shards=count.shards,
        shards_to_make=count.shards_to_make,
        samples=round(mean(made) * count.sources_to_make),
        samples_error=round(deviation * count.sources_to_make),
        read_bytes=count.bytes,
        written_bytes=round(mean(sizes) * count.sources_to_make),
        probed_sources=len(probed),
        samples_per_second=round(per_second, 2),
        cores=cores * nodes,
        nodes=nodes,
        hours=round(seconds / 3600, 4),
        cost=None if price is None else round(price * nodes * seconds / 3600, 2),
    )


class _Count:
    def __init__(self) -> None:
        self.sources = self.shards = self.shards_to_make = self.sources_to_make = self.bytes = 0
        self.largest = 0  # sources of a shard to make

    def missing(self, plans: Iterable[ShardPlan], inventory: Inventory) -> Iterator[Source]:
        """The sources whose shards are not there."""
        for plan in plans:
            self.shards += 1
            self.sources += len(plan.sources)
            if not inventory.holds(plan):
                self.shards_to_make += 1
                self.sources_to_make += len(plan.sources)
                self.largest = max(self.largest, len(plan.sources))
                self.bytes += sum(source.size for source in plan.sources)
                yield from plan.sources

    def sources_of_a_core(self, cores: int) -> float:
        """How many the busiest core makes. It shares a shard with others only if there are more cores than shards."""
        equal = self.sources_to_make / (cores * (EFFICIENCY if cores > 1 else 1))
        return equal if self.shards_to_make < cores else max(equal, self.largest)


def _probed(sources: list[Source], recipe: Recipe, progress: bool) -> list[tuple[int, int, float]]:
    """Makes the samples of each source in memory, on one thread, until time is up: samples, bytes, seconds."""
    found = []
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        for source in tqdm(sources, unit="source", desc="probe", disable=not progress, leave=False):
            begin = time.perf_counter()
            try:
                drafts = samples_of(source, *read_source(source), recipe).samples
            except (FileNotFoundError, RejectedImage):
                drafts = []
            size = sum(len(data) for draft in drafts for data in draft.members.values())
            found.append((len(drafts), size, time.perf_counter() - begin))
            if sum(seconds for _, _, seconds in found) > _PROBE_SECONDS:
                break
    finally:
        cv2.setNumThreads(threads)
    return found
