"""Rate of the shards job on all its workers against as many times one thread, and the memory of a worker.

    python -m benchmarks.shards [--samples 5000] [--workers 2] [--thread-share 0.25]
    python -m benchmarks.shards --one-shard [--workers 2] [--rounds 5]

4K JPEG sources, 12 crops each, DeeDSR's ranges. The thread makes a share of the same shards in this process, before and
after the job, so that a machine that slows down shows. Start-up (Ray, imports, planning) is left out of the job's rate
and reported. Beside them: as many processes as the job has workers, side by side and without Ray, which shows what the
machine's cores give when all of them work. All arms must give the same shards. Prints a table and, last, one JSON line.

`--one-shard`: the job with one worker and with several, in turns, on datasets of a single shard: of 16 such sources, of
one of them with 16 variants of each crop, and `--hr-from` the first. Medians over the rounds, after one that starts
Ray's processes. Beside them the same work in plain processes, in one and in as many as workers, and the machine's load.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

from benchmarks.sources_4k import make_sources
from deedsr.dataset.recipe import Recipe, load_recipe
from pipelines.shards import ShardsResult, generate, hr_job, run_job
from pipelines.shards.build import FromSources
from pipelines.shards.listing import list_sources
from pipelines.shards.plan import ShardPlan, plan_shards
from pipelines.storage import open_storage

GOAL = 0.9  # of workers times one thread
MEMORY_GOAL_MB = 600
ONE_SHARD_LIMIT = 1.7  # times one worker, of two
SOURCES = 16  # of the single shard
SHARD = {"min_sources": 3, "target_sources": 6, "max_sources": 12}  # 20 shards or more for each worker


class WorkerMemory:
    """Greatest resident memory of the job's worker processes, by tenth of the time."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "WorkerMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "ray::FlatMap" in " ".join(process.cmdline()):
                        self.seen.append((time.time(), process.memory_info().rss / 1e6))
                except psutil.Error:
                    continue

    def peak(self, first: float, last: float) -> float:
        """MB, between two shares of the time."""
        begin, end = self.seen[0][0], self.seen[-1][0]
        return max(mb for at, mb in self.seen if first <= (at - begin) / (end - begin) <= last)


def by_one_thread(plans: list[ShardPlan], recipe: Recipe, out: str) -> tuple[float, set[str]]:
    """Samples per second, and names of the shards."""
    begin = time.perf_counter()
    records = [FromSources(recipe).build(plan, open_storage(out)) for plan in plans]
    samples = sum(record.samples for record in records)
    return samples / (time.perf_counter() - begin), {record.name for record in records}


def side_by_side(plans: list[ShardPlan], recipe: Recipe, outs: list[str]) -> float:
    """Samples per second of processes that each make all of `plans`, into an output of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(outs), mp_context=context) as processes:
        list(processes.map(partial(by_one_thread, plans[:1], recipe), [f"{out}-start" for out in outs]))
        return sum(rate for rate, _ in processes.map(partial(by_one_thread, plans, recipe), outs))


def one_shard(workers: int, rounds: int) -> None:
    """Speed-up of single shards by workers."""
    whole = {"min_sources": SOURCES, "target_sources": SOURCES, "max_sources": SOURCES}
    changes = {"shard": whole, "split": {"validation_patterns": ["nothing"], "validation_share": 0}}
    recipe = Recipe.model_validate(load_recipe("deedsr").model_dump(mode="json") | changes)
    many = Recipe.model_validate(recipe.model_dump(mode="json") | {"variants": SOURCES})
    with tempfile.TemporaryDirectory() as work:
        make_sources(Path(work) / "sources", SOURCES)
        make_sources(Path(work) / "source", 1)
        generate([f"{work}/sources"], f"{work}/hr", recipe, 1, progress=False)
        arms: dict[str, Callable[[str, int], ShardsResult]] = {
            f"{SOURCES} sources": lambda out, n: generate([f"{work}/sources"], out, recipe, n, progress=False),
            f"1 source, {SOURCES} variants": lambda out, n: generate([f"{work}/source"], out, many, n, progress=False),
            "--hr-from": lambda out, n: run_job(hr_job(f"{work}/hr", out, load_recipe("heavy")), n, progress=False),
        }
        [plan] = plan_shards(list_sources([f"{work}/sources"]), recipe)
        quarter = replace(plan, sources=plan.sources[: SOURCES // 4])
        rates: dict[tuple[str, int], list[float]] = defaultdict(list)
        load = []
        for number in range(rounds + 1):
            for name, make in arms.items():
                results = {n: make(f"{work}/{number}-{n}-{name.replace(' ', '-')}", n) for n in (1, workers)}
                assert len({result.digest for result in results.values()}) == 1, "the arms differ"
                assert all(result.shards == 1 for result in results.values())
                for n, result in results.items():
                    rates[name, n].append(result.samples_per_second)
            for n in (1, workers):
                outs = [f"{work}/{number}-{n}-{process}" for process in range(n)]
                rates["plain processes", n].append(side_by_side([quarter], recipe, outs))
            load.append(os.getloadavg()[0])
    print(f"{'samples/s':28}{'1 worker':>10}{f'{workers} workers':>12}{'ratio':>8}{'first round':>14}")
    ratios = {}
    for name in [*arms, "plain processes"]:
        one, several = (statistics.median(rates[name, n][1:]) for n in (1, workers))
        ratios[name] = round(several / one, 3)
        first = rates[name, workers][0] / rates[name, 1][0]
        print(f"{name:28}{one:10.1f}{several:12.1f}{ratios[name]:8.2f}{first:14.2f}")
    print(
        f"limit {ONE_SHARD_LIMIT} for {SOURCES} sources on 2 workers; load average {min(load):.1f} to {max(load):.1f}"
    )
    result = {
        "workers": workers,
        "rounds": rounds,
        "one_shard_ratio": ratios,
        "limit": ONE_SHARD_LIMIT,
        "samples_per_second": {f"{name}, {n}": [round(rate, 1) for rate in seen] for (name, n), seen in rates.items()},
        "load": [round(value, 1) for value in load],
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--thread-share", type=float, default=0.25)
    parser.add_argument("--one-shard", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.one_shard:
        one_shard(options.workers, options.rounds)
        return
    recipe = Recipe.model_validate(load_recipe("deedsr").model_dump(mode="json") | {"shard": SHARD})
    with tempfile.TemporaryDirectory() as work:
        make_sources(Path(work) / "sources", -(-options.samples // recipe.crop.per_source))
        plans = list(plan_shards(list_sources([f"{work}/sources"]), recipe))
        some = plans[: max(1, round(len(plans) * options.thread_share / 2))]
        before, names = by_one_thread(some, recipe, f"{work}/before")
        with WorkerMemory() as memory:
            job = generate([f"{work}/sources"], f"{work}/job", recipe, options.workers)
        together = side_by_side(some, recipe, [f"{work}/{number}" for number in range(options.workers)])
        after, again = by_one_thread(some, recipe, f"{work}/after")
        assert names == again <= {path.name for path in Path(work, "job").glob("*.tar")}, "the arms differ"
    thread = (before + after) / 2
    efficiency = job.samples_per_second / (options.workers * thread)
    early, late = memory.peak(0, 0.3), memory.peak(0.7, 1)
    print(f"{job.samples} samples, {job.shards} shards, recipe {recipe.name}")
    print(f"{'':24}{'samples/s':>12}")
    print(f"{'one thread, before':24}{before:12.1f}\n{'one thread, after':24}{after:12.1f}")
    print(
        f"{f'job, {options.workers} workers':24}{job.samples_per_second:12.1f}   start-up {job.start_up_seconds:.1f} s"
    )
    print(f"{f'{options.workers} processes, no Ray':24}{together:12.1f}")
    ceiling = together / (options.workers * thread)
    print(f"efficiency {efficiency:.1%} (goal {GOAL:.0%}); of the processes without Ray {ceiling:.1%}")
    print(f"a worker's memory: {early:.0f} MB in the first third, {late:.0f} MB in the last (goal {MEMORY_GOAL_MB})")
    result = {
        "samples": job.samples,
        "shards": job.shards,
        "workers": options.workers,
        "thread_samples_per_second": [round(before, 2), round(after, 2)],
        "job_samples_per_second": job.samples_per_second,
        "job_start_up_seconds": job.start_up_seconds,
        "efficiency": round(efficiency, 3),
        "goal": GOAL,
        "efficiency_without_ray": round(ceiling, 3),
        "worker_mb": {"first third": round(early), "last third": round(late), "goal": MEMORY_GOAL_MB},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
