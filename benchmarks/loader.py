"""Samples per second and core of our loader against the `webdataset` library and `ray.data.read_webdataset`.

    python -m benchmarks.loader [--samples 600] [--rounds 5] [--recipe deedsr] [--cpu-nodes]

The same local shards, 512 px crops; every arm decodes HR, LR and JSON with the same functions and stacks batches of 8.
Each arm is a process (Ray: its cluster) pinned to one core, with one thread that decodes; arms run in turns, start-up
is left out, the median of the rounds counts. Per core: by the second of processor time, which other work on the machine
hardly changes. Only ours gives an exact order: the others read the shards from beginning to end.
With --cpu-nodes one more arm, on all cores: Ray Data tasks decode as they would on CPU-only nodes, and hand pixels
through the object store to one process that takes them. Prints a table and, last, one JSON line.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deedsr.dataset.members import decode_stored
from deedsr.degradation.chain import prepare_worker
from pipelines.machine import allowed_cpus

BATCH, WARM_UP = 8, 40
SHARD = {"min_sources": 1, "target_sources": 2, "max_sources": 3}


def decoded(sample: dict[str, Any]) -> dict[str, Any]:
    """Members by WebDataset's extensions to pixels."""
    arrays = {name: decode_stored(sample[ext]) for ext in sample for name in ("hr", "lr") if ext.startswith(f"{name}.")}
    json.loads(sample["json"])
    return arrays


def ours(shards: str) -> Iterator[int]:
    from dataclasses import replace

    from pipelines.data.dataset import Dataset
    from pipelines.data.loader import follow, micro_batches
    from pipelines.data.order import SampleOrder
    from pipelines.data.shard_cache import ShardCache

    cache = ShardCache(0)
    dataset = replace(Dataset.open(shards), through=cache.open)
    index = dataset.index()
    order = SampleOrder(index, dataset.digest, 0, together=False)

    def read(epoch: int, row: int) -> dict[str, Any]:
        sample = dataset.read(index, row)
        return {"hr": sample.hr, "lr": sample.lr}

    steps = {"first_step": 0, "last_step": 10**6, "global_batch": BATCH, "micro": BATCH, "world_size": 1, "rank": 0}
    at = follow(cache, order, index)
    for batch in micro_batches(order, read, threads=1, at=at, **steps):  # type: ignore[arg-type]
        yield len(batch["hr"])


def webdataset(shards: str) -> Iterator[int]:
    import webdataset as wds

    urls = sorted(str(path) for path in Path(shards).glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=False, empty_check=False).map(decoded).repeat()
    held: list[dict[str, Any]] = []
    for sample in dataset:
        held.append(sample)
        if len(held) == BATCH:
            batch = {name: np.stack([one[name] for one in held]) for name in ("hr", "lr")}
            held.clear()
            yield len(batch["hr"])


def ray_data(shards: str, cpus: int = 1) -> Iterator[int]:
    import ray

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=cpus, object_store_memory=600 << 20, **quiet)
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    urls = sorted(str(path) for path in Path(shards).glob("*.tar"))

    def decode(sample: dict[str, Any]) -> dict[str, Any]:
        prepare_worker()
        return decoded({ext: data for ext, data in sample.items() if not ext.startswith("__")})

    for batch in ray.data.read_webdataset(urls * 100, decoder=decode).iter_batches(batch_size=BATCH):
        yield len(batch["hr"])


ARMS = {"ours": ours, "webdataset": webdataset, "ray.data": ray_data}
GOAL = 1.0  # of the faster of the others


def cpu_seconds() -> float:
    """Of this process and all below it, Ray's included."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def measure(arm: str, shards: str, samples: int) -> tuple[float, float]:
    """Samples per second and per second of processor time, after the warm-up."""
    prepare_worker()
    batches = ray_data(shards, cpus=2) if arm == "cpu nodes" else ARMS[arm](shards)
    seen = 0
    while seen < WARM_UP:
        seen += next(batches)
    seen, began, used = 0, time.perf_counter(), cpu_seconds()
    while seen < samples:
        seen += next(batches)
    return seen / (time.perf_counter() - began), seen / (cpu_seconds() - used)


def run_arm(arm: str, shards: str, samples: int, cores: set[int]) -> tuple[float, float]:
    words = [sys.executable, "-m", "benchmarks.loader", "--measure", arm, "--shards", shards, "--samples", str(samples)]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    rate, per_core = json.loads(done.stdout.splitlines()[-1])
    print(f"{arm}: {rate:.1f} samples/s, {per_core:.1f} per core", file=sys.stderr)
    return rate, per_core


def make_shards(folder: Path, recipe_name: str) -> str:
    from deedsr.dataset.recipe import Recipe, load_recipe
    from pipelines.shards import generate

    recipe = Recipe.model_validate(load_recipe(recipe_name).model_dump(mode="json") | {"shard": SHARD, "variants": 4})
    generate([str(files("deedsr") / "assets" / "photos")], str(folder), recipe, workers=2, progress=False)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", default="deedsr")
    parser.add_argument("--cpu-nodes", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--shards", help="an existing dataset on this machine")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.shards, options.samples)), flush=True)
        os._exit(0)  # without waiting for what was read ahead
    with tempfile.TemporaryDirectory() as work:
        shards = options.shards or make_shards(Path(work) / "shards", options.recipe)
        both = allowed_cpus()
        rates: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
        for _ in range(options.rounds):
            for arm, measured in rates.items():
                measured.append(run_arm(arm, shards, options.samples, {max(both)}))
        if options.cpu_nodes:
            rates["cpu nodes"] = [run_arm("cpu nodes", shards, options.samples, both) for _ in range(options.rounds)]
    wall, core = ({arm: statistics.median(r[i] for r in rates[arm]) for arm in rates} for i in range(2))
    print(f"{'':14}{'samples/s':>12}{'per core':>12}{'lowest':>10}{'highest':>10}")
    for arm, measured in rates.items():
        spread = [per_core for _, per_core in measured]
        print(f"{arm:14}{wall[arm]:12.1f}{core[arm]:12.1f}{min(spread):10.1f}{max(spread):10.1f}")
    ratio = core["ours"] / max(core["webdataset"], core["ray.data"])
    print(f"ours / faster of webdataset and ray.data, per core: {ratio:.2f} (goal {GOAL:g})")
    result = {"per_core": core, "samples_per_second": wall, "ratio": ratio, "goal": GOAL}
    print(json.dumps(result, default=lambda number: round(number, 3)))


if __name__ == "__main__":
    main()
