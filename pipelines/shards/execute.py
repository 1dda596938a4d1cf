"""Builds shards on the cluster with Ray Data: a row is a handful of shards of one part of the plan."""

import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from deedsr.errors import DeeDSRError
from pipelines import cluster
from pipelines.placement import NETWORK_WORKER, SHARD_WORKER, WorkPlan, place_shards
from pipelines.shards.build import ShardWork
from pipelines.shards.plan import ShardPlan
from pipelines.shards.record import record_key
from pipelines.shards.run import PlanParts, read_part
from pipelines.storage import Storage
from pipelines.storage.waiting import patiently

__all__ = ["Built", "build_missing"]

logger = logging.getLogger(__name__)

_MAX_SHARDS_PER_ROW = 8
_ROWS_PER_WORKER = 16  # enough that the last row does not keep one worker busy for long


class Built(NamedTuple):
    """One shard that was committed; `key` is what an inventory knows of its record."""

    id: str
    key: tuple[str, int]
    sources: int
    samples: int
    started: float  # seconds since the epoch


def build_missing(
    parts: PlanParts, work: ShardWork, out: Storage, workers: int | None, actors: WorkPlan | None = None
) -> Iterator[Built]:
    """Builds every shard that is not there; yields each as it is committed, in any order.

    `workers`: CPUs in use at a time, None for every one that the memory does for. `actors`: tasks run in actors of this
    plan, which keep their copy of `work`, because it is slow to set up.
    """
    count = parts.missing_shards
    if not count:
        return
    data = cluster.data()
    from ray.exceptions import RayError

    offer = cluster.offer()
    plan = actors or place_shards(offer, workers)
    parallel = plan.workers
    if actors is None:
        logger.info("shards: %s", plan)
        cluster.wait_for(plan, "")
    per_row = min(max(count // (parallel * _ROWS_PER_WORKER), 1), _MAX_SHARDS_PER_ROW)
    rows = [
        {"part": name, "shards": shards[start : start + per_row], "cpus": 1}
        for name, shards in parts.missing
        for start in range(0, len(shards), per_row)
    ]
    if actors is None and count < parallel:  # a row is a shard then
        for row, cpus in zip(rows, _shares(_sizes(parts), parallel), strict=True):
            row["cpus"] = cpus
    items = data.from_items(rows, override_num_blocks=len(rows))
    if actors is None:
        built = items.flat_map(
            partial(_task, folder=parts.folder, work=work, out=out),
            num_cpus=1,
            # On a cluster that grows, what its autoscaler adds takes part.
            compute=data.TaskPoolStrategy(size=min(parallel, len(rows)) if workers or offer.local else None),
        )
    else:
        built = items.flat_map(
            _Actor,
            fn_constructor_kwargs={"folder": parts.folder, "work": work, "out": out},
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
            compute=data.ActorPoolStrategy(min_size=1, max_size=min(parallel, len(rows))),
        )
    try:
        for row in built.iter_rows():
            cluster.raise_error(row)
            yield Built(row["id"], (row["hash"], row["bytes"]), row["sources"], row["samples"], row["started"])
    except RayError as error:
        less, each = "fewer --workers need less", SHARD_WORKER
        if actors is not None:
            less, each = "fewer --workers or a smaller --batch-size need less", NETWORK_WORKER
        last = cluster.last_words(error, f"{parallel} workers take about {parallel * each / 1e9:.1f} GB; {less}")
        raise DeeDSRError(
            f"making shards failed: {last}; run the same command again, it reuses what is done"
        ) from error


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


def _task(row: dict[str, Any], folder: Storage, work: ShardWork, out: Storage) -> Iterator[dict[str, Any]]:
    started = time.time()
    try:
        plans = read_part(folder, row["part"])
    except DeeDSRError as error:
        yield _summary("", 0) | cluster.error_values(error) | {"started": started}
        return
    for number in row["shards"]:
        yield _build(plans[number], work, out, row["cpus"]) | {"started": started}


class _Actor:
    """`_task` in a process that keeps `work`, and with it what `work` loads for its first shard."""

    def __init__(self, folder: Storage, work: ShardWork, out: Storage):
        self._task = partial(_task, folder=folder, work=work, out=out)

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        return self._task(row)


def _build(plan: ShardPlan, work: ShardWork, out: Storage, cpus: int) -> dict[str, Any]:
    summary = _summary(plan.id, len(plan.sources))
    try:
        record = patiently(lambda: work.build(plan, out, cpus))
    except DeeDSRError as error:
        return summary | cluster.error_values(error)
    hash, size = record_key(record)
    return summary | {"hash": hash, "bytes": size, "samples": record.samples} | cluster.error_values()


def _summary(id: str, sources: int) -> dict[str, Any]:
    return {"id": id, "sources": sources, "hash": "", "bytes": 0, "samples": 0}
