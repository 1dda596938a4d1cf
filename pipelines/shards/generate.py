"""The shards job: plan, build on Ray Data what is not committed yet, assemble."""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from deedsr.dataset.manifest import MANIFEST
from deedsr.degradation.recipe import Recipe
from deedsr.errors import DeeDSRError, UsageError
from pipelines import cluster
from pipelines.shards.assemble import assemble
from pipelines.shards.build import ShardRecord, build_shard, read_record, record_path
from pipelines.shards.plan import ShardPlan, plan_shards
from pipelines.shards.sources import list_sources
from pipelines.storage import Storage, open_storage

__all__ = ["ShardsResult", "generate"]

_MAX_SHARDS_PER_BLOCK = 8
_BLOCKS_PER_WORKER = 8  # enough that the last block does not keep one worker busy for long


@dataclass
class ShardsResult:
    """INTERFACE's result of `deedsr shards`. `samples_per_second` counts new samples and leaves the start-up out."""

    manifest: str
    digest: str
    samples: int
    shards: int
    written: int  # shards made by this run
    reused: int  # shards that were there
    rejected: int  # sources
    seconds: float
    start_up_seconds: float
    samples_per_second: float


def generate(
    sources: Sequence[str], out: str, recipe: Recipe, workers: int | None = None, progress: bool = True
) -> ShardsResult:
    """Makes or completes the dataset `out` of the pictures in `sources` (folders, list files, S3 prefixes).

    `workers`: tasks at a time, None for every CPU of the cluster. Shards whose sources, recipe and algorithm are as
    before are reused. Raises UsageError for sources or a place that cannot be used, DeeDSRError if the work failed;
    what was committed stays, and the same call continues from there.
    """
    begin = time.time()
    storage = open_storage(out)
    plans = plan_shards(list_sources(sources), recipe)
    sizes = {entry.path: entry.size for entry in storage.list()}
    records = _committed(plans, storage, sizes)
    missing = [plan for plan in plans if plan.id not in records]
    first_start = time.time()
    built = 0
    with tqdm(
        total=sum(len(plan.sources) for plan in plans),
        initial=sum(len(plan.sources) for plan in plans if plan.id in records),
        unit="source",
        desc="shards",
        disable=not progress,
    ) as bar:
        for summary in _build_all(missing, recipe, storage, workers):
            first_start = summary["started"] if not built else min(first_start, summary["started"])
            built += summary["samples"]
            bar.set_postfix_str(f"{built / max(time.time() - first_start, 1e-3):.1f} samples/s", refresh=False)
            bar.update(summary["sources"])
    records |= _read_all(missing, storage)
    manifest = assemble(plans, [records[plan.id] for plan in plans], recipe, storage)
    end = time.time()
    return ShardsResult(
        manifest=f"{storage.uri}/{MANIFEST}",
        digest=manifest.digest,
        samples=manifest.samples,
        shards=len(manifest.shards),
        written=sum(records[plan.id].samples > 0 for plan in missing),
        reused=len(manifest.shards) - sum(records[plan.id].samples > 0 for plan in missing),
        rejected=manifest.rejected,
        seconds=round(end - begin, 3),
        start_up_seconds=round(max(first_start - begin, 0.0), 3),
        samples_per_second=round(built / max(end - first_start, 1e-3), 3),
    )


def _committed(plans: Sequence[ShardPlan], out: Storage, sizes: dict[str, int]) -> dict[str, ShardRecord]:
    """Records of the shards that are there already, by plan id. A record counts if its tar is there in full size."""
    records = _read_all([plan for plan in plans if record_path(plan) in sizes], out)
    return {id: record for id, record in records.items() if not record.name or sizes.get(record.name) == record.bytes}


def _read_all(plans: Sequence[ShardPlan], out: Storage) -> dict[str, ShardRecord]:
    with ThreadPoolExecutor(16) as threads:
        records = threads.map(partial(read_record, out=out), plans)
        return {plan.id: record for plan, record in zip(plans, records, strict=True)}


def _build_all(
    plans: Sequence[ShardPlan], recipe: Recipe, out: Storage, workers: int | None
) -> Iterator[dict[str, Any]]:
    """Builds shards on the cluster; yields {started, sources, samples} of each as it is committed, in any order."""
    if not plans:
        return
    cluster.connect()
    import ray.data
    from ray.exceptions import RayError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    parallel = workers or max(1, int(cluster.resources().get("CPU", 1)))
    per_block = min(max(len(plans) // (parallel * _BLOCKS_PER_WORKER), 1), _MAX_SHARDS_PER_BLOCK)
    blocks = -(-len(plans) // per_block)
    work = ray.data.from_items([{"plan": plan} for plan in plans], override_num_blocks=blocks).map(
        partial(_task, recipe=recipe, out=out),
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=workers and min(workers, blocks)),
    )
    try:
        for summary in work.iter_rows():
            if summary["error"]:
                raise (UsageError if summary["usage"] else DeeDSRError)(summary["error"])
            yield summary
    except RayError as error:
        last = str(error).strip().splitlines()[-1]
        raise DeeDSRError(
            f"making shards failed: {last}; run the same command again, it reuses what is done"
        ) from error


def _task(row: dict[str, Any], recipe: Recipe, out: Storage) -> dict[str, Any]:
    plan: ShardPlan = row["plan"]
    summary = {"started": time.time(), "sources": len(plan.sources), "samples": 0, "error": "", "usage": False}
    try:
        # A user's mistake travels as a value: as an exception it would come back wrapped in Ray's traceback.
        return summary | {"samples": build_shard(plan, recipe, out).samples}
    except DeeDSRError as error:
        return summary | {"error": str(error), "usage": isinstance(error, UsageError)}
