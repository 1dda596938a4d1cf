"""From a source to the tar, one thread: samples per second, and where each millisecond goes.

    python -m benchmarks.source_to_tar [--sources 8] [--rounds 3]

4K JPEG sources, 12 crops each, DeeDSR's ranges: with a lossless HR, with HR as JPEG, and new degradations of the HR
that a dataset holds (`--hr-from`). Beside them, on the same sources and draws, the plain way: the degradation as
`tests/plain_degradation.py` writes it down, PNG as OpenCV writes it, `webdataset.TarWriter`. The best of the rounds
counts. Prints tables and, last, one JSON line.
"""

import argparse
import io
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import webdataset

from benchmarks.sources_4k import make_sources
from deedsr.dataset.crops import choose_crops, cut
from deedsr.dataset.keys import generator
from deedsr.dataset.recipe import Recipe, load_recipe
from deedsr.degradation.chain import prepare_worker
from deedsr.degradation.draws import draw_degradation
from pipelines.data.dataset import Dataset
from pipelines.shards import samples, shard
from pipelines.shards.assemble import assemble
from pipelines.shards.build import FromHR, FromSources
from pipelines.shards.execute import Job
from pipelines.shards.generate import index_of
from pipelines.shards.listing import list_sources
from pipelines.shards.plan import derived_plan, plan_shards
from pipelines.storage import open_storage
from tests.plain_degradation import degrade as plain_degrade

LIMITS = {"lossless": 30.0, "jpeg": 50.0, "hr_from": 60.0}  # samples per second of one thread
STAGES = {
    "decode": (samples, "decode"),
    "choose crops": (samples, "choose_crops"),
    "degrade": (samples, "degrade"),
    "draw": (samples, "assign_degradation"),
    "encode": (samples, "encode"),
    "decode stored HR": (samples, "decode_stored"),
    "write record": (shard, "write_record"),
}


class Clock:
    """Seconds spent in each named function, while it is patched into the modules that call it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "Clock":
        for stage, (module, name) in STAGES.items():
            function = getattr(module, name)
            self._before.append((module, name, function))
            setattr(module, name, self._timed(stage, function))
        return self

    def __exit__(self, *error: Any) -> None:
        for module, name, function in self._before:
            setattr(module, name, function)

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] += time.perf_counter() - begin

        return timed


def plain(sources: list[Path], recipe: Recipe) -> tuple[int, float]:
    """Samples and seconds of the plain way."""
    begin, count = time.perf_counter(), 0
    writer = webdataset.TarWriter(io.BytesIO(), encoder=False)
    for path in sources:
        rng = generator("crops", recipe.seed, 0, path.name)
        image = cv2.cvtColor(
            cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
        )
        for place in choose_crops(image, recipe.crop, rng)[0]:
            hr = np.ascontiguousarray(cut(image, place))
            draws = draw_degradation(
                recipe.degradation, hr.shape[:2], recipe.scale, generator("plain", path.name, count)
            )
            png = lambda pixels: cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
            members = {"hr.png": png(hr), "lr.png": png(plain_degrade(hr, draws)), "json": json.dumps(draws).encode()}
            writer.write({"__key__": f"{count:08d}", **members})
            count += 1
    return count, time.perf_counter() - begin


def measured(work: Any, plans: list, out: str) -> tuple[int, float, dict[str, float], int]:
    """Samples, seconds, seconds by stage and bytes of building `plans`."""
    storage = open_storage(out)
    with Clock() as clock:
        begin = time.perf_counter()
        records = [work.build(plan, storage) for plan in plans]
        seconds = time.perf_counter() - begin
    return sum(r.samples for r in records), seconds, clock.seconds, sum(r.bytes for r in records)


def with_format(recipe: Recipe, hr: str) -> Recipe:
    fields = recipe.model_dump(mode="json")
    fields["formats"]["hr"] = hr
    return Recipe.model_validate(fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prepare_worker()
    lossless = load_recipe("deedsr")
    with tempfile.TemporaryDirectory() as work:
        make_sources(Path(work) / "sources", options.sources)
        sources = [f"{work}/sources"]
        arms: dict[str, tuple[Any, list]] = {
            "lossless": (FromSources(lossless), list(plan_shards(list_sources(sources), lossless))),
        }
        jpeg = with_format(lossless, "jpeg")
        arms["jpeg"] = FromSources(jpeg), list(plan_shards(list_sources(sources), jpeg))

        # The dataset whose HR is degraded anew.
        held = open_storage(f"{work}/held")
        records = [arms["lossless"][0].build(plan, held) for plan in arms["lossless"][1]]
        job = Job(list, arms["lossless"][0], held, lossless)
        assemble(job, zip(arms["lossless"][1], records, strict=True), expected=None)
        dataset = Dataset.open(held.uri)
        other = lossless.degrading(load_recipe("realesrgan"))
        derived = [derived_plan(shard, other.digest) for shard in dataset.manifest.shards]
        arms["hr_from"] = FromHR(other, held, index_of(dataset)), derived

        best: dict[str, tuple[int, float, dict[str, float], int]] = {}
        slow = (1, float("inf"))
        for number in range(options.rounds):
            slow = min(slow, plain(sorted(Path(sources[0]).iterdir()), lossless), key=lambda run: run[1] / run[0])
            for name, (shard_work, plans) in arms.items():
                run = measured(shard_work, plans, f"{work}/{name}-{number}")
                best[name] = min(best.get(name, run), run, key=lambda run: run[1])
    report(best, slow)


def report(best: dict[str, tuple[int, float, dict[str, float], int]], slow: tuple[int, float]) -> None:
    print(f"{'milliseconds a sample':24}" + "".join(f"{name:>12}" for name in best))
    for stage in STAGES:
        row = "".join(f"{1e3 * seconds[stage] / count:12.2f}" for count, _, seconds, _ in best.values())
        print(f"{stage:24}{row}")
    rest = [1e3 * (total - sum(seconds.values())) / count for count, total, seconds, _ in best.values()]
    print(f"{'read, hash, tar, rows':24}" + "".join(f"{value:12.2f}" for value in rest))
    print(f"{'all':24}" + "".join(f"{1e3 * total / count:12.2f}" for count, total, _, _ in best.values()))
    rates = {name: count / total for name, (count, total, _, _) in best.items()}
    print(f"{'samples/s, one thread':24}" + "".join(f"{rate:12.1f}" for rate in rates.values()))
    print(f"{'goal':24}" + "".join(f"{LIMITS[name]:12.1f}" for name in best))
    print(f"{'kB a sample':24}" + "".join(f"{size / count / 1e3:12.1f}" for count, _, _, size in best.values()))
    print(f"the plain way, lossless: {slow[0] / slow[1]:.1f} samples/s")
    fewer = (best["lossless"][3] / best["lossless"][0]) / (best["hr_from"][3] / best["hr_from"][0])
    print(f"bytes written by --hr-from: {fewer:.1f} times fewer")
    result = {
        "samples_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "goals": LIMITS,
        "plain_samples_per_second": round(slow[0] / slow[1], 2),
        "hr_from_bytes_fewer": round(fewer, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
