"""How far the shards job scales before something breaks: planning by sources, driving by shards, nothing degraded.

    python -m benchmarks.scaling [--plan 100000 1000000 10000000] [--drive 1000 10000 100000] [--work FOLDER]

Each size runs in a process of its own. Planning: a synthetic listing is sorted, cut and written in parts, as the driver
does it. Driving: every shard goes through the real job (Ray Data, tar, record, index, manifest), but holds four empty
samples; `--work` should be in memory (/dev/shm), for a disk would be measured otherwise. Prints a table and, last, one
JSON line: seconds, peak memory of the driver, objects written.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deedsr.dataset.recipe import Recipe, load_recipe
from pipelines.shards.build import shard_draft
from pipelines.shards.execute import PlanParts
from pipelines.shards.generate import Job, run_job
from pipelines.shards.plan import ShardPlan, plan_shards
from pipelines.shards.samples import Draft
from pipelines.shards.shard import Inventory, ShardRecord
from pipelines.shards.source import Source
from pipelines.storage import Storage, open_storage

LIMIT_GB = 2.0  # memory of the driver
SAMPLES = 4  # of a driven shard


def listing(count: int) -> Iterator[Source]:
    """As of a bucket with a thousand pictures in each folder."""
    for number in range(count):
        path = f"{number // 1000:06d}/photo-{number:09d}.jpg"
        yield Source(0, path, f"s3://photographs/collection/{path}", 2_000_000 + number, f"{number:032x}")


def with_shards_of(recipe: Recipe, sources: int) -> Recipe:
    shard = {"min_sources": sources, "target_sources": sources, "max_sources": sources}
    return Recipe.model_validate(recipe.model_dump(mode="json") | {"shard": shard})


@dataclass(frozen=True)
class EmptySamples:
    """Shard work without pictures."""

    def build(self, plan: ShardPlan, out: Storage, cpus: int = 1) -> ShardRecord:
        with shard_draft(plan) as draft:
            for source in plan.sources:
                draft.sources.append((source.path, plan.id))
                for number in range(SAMPLES):
                    key = f"{plan.id[:20]}-{number:02d}"
                    row = {
                        "key": key,
                        "content": plan.id[:20],
                        "variant": number,
                        "source": source.path,
                        "lr_ext": "png",
                    }
                    draft.add(Draft({"lr": b"", "json": plan.id.encode()}, row), source.uri)
            return draft.commit(out)


def plan(count: int, work: str) -> dict[str, float]:
    parts = PlanParts(open_storage(f"{work}/plan"))
    parts.write(plan_shards(listing(count), load_recipe("deedsr")), Inventory({}, {}))
    return {"sources": parts.sources, "shards": parts.shards}


def drive(count: int, work: str) -> dict[str, float]:
    recipe = with_shards_of(load_recipe("deedsr"), 1)
    plans = lambda: plan_shards(listing(count), recipe)
    result = run_job(Job(plans, EmptySamples(), open_storage(f"{work}/out"), recipe), None, False)
    assert (result.shards, result.samples) == (count, SAMPLES * count)
    return {"sources": count, "shards": result.shards, "start_up_seconds": result.start_up_seconds}


def measure(kind: str, count: int, work: str) -> dict[str, float]:
    """In a fresh process, so that its peak memory is its own."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        command = [sys.executable, "-m", "benchmarks.scaling", "--one", kind, str(count), "--work", folder]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--drive", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--work", default="/dev/shm")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        begin = time.perf_counter()
        numbers = {"plan": plan, "drive": drive}[options.one[0]](int(options.one[1]), options.work)
        numbers["seconds"] = round(time.perf_counter() - begin, 1)
        numbers["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
        numbers["written_gb"] = round(
            sum(p.stat().st_size for p in Path(options.work).rglob("*") if p.is_file()) / 1e9, 3
        )
        print(json.dumps(numbers))
        return
    results = []
    print(f"{'':8}{'sources':>12}{'shards':>12}{'seconds':>10}{'per second':>12}{'driver GB':>11}{'written GB':>12}")
    for kind, sizes in (("plan", options.plan), ("drive", options.drive)):
        for size in sizes:
            numbers = measure(kind, size, options.work)
            results.append({"kind": kind} | numbers)
            rate = numbers["sources" if kind == "plan" else "shards"] / numbers["seconds"]
            print(
                f"{kind:8}{numbers['sources']:>12,}{numbers['shards']:>12,}{numbers['seconds']:>10.1f}{rate:>12,.0f}"
                f"{numbers['peak_gb']:>11.2f}{numbers['written_gb']:>12.3f}",
                flush=True,
            )
    within = all(result["peak_gb"] < LIMIT_GB for result in results)
    print(f"driver below {LIMIT_GB:g} GB at every size: {'yes' if within else 'NO'}")
    print(json.dumps({"results": results, "limit_gb": LIMIT_GB, "within_limit": within}))


if __name__ == "__main__":
    main()
