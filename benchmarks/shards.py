"""Source-to-tar rate of the shards job beside one thread in this process, on the same sources and recipe.

    python benchmarks/shards.py [--recipe deedsr] [--samples 1000] [--workers 2]

Prints a table and, last, one JSON line. Sources are links to the shipped photographs under many names (crops and
degradations follow from the name, so no two are alike). The job's start-up (Ray, imports, planning) is left out of its
rate and reported. Both arms must give the same shards.
"""

import argparse
import json
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from deedsr.degradation.recipe import Recipe, load_recipe
from pipelines.shards import generate
from pipelines.shards.build import FromSources
from pipelines.shards.plan import plan_shards
from pipelines.shards.sources import list_sources
from pipelines.storage import open_storage


def link_sources(folder: Path, recipe: Recipe, samples: int) -> None:
    """Enough names for about `samples` samples: a 1600 px photograph holds few 512 px crops."""
    photos = sorted(Path(str(files("deedsr") / "assets" / "photos" / "train")).glob("*.jpg"))
    per_photo = min(recipe.crop.per_source, (1600 // recipe.crop.size) * (900 // recipe.crop.size)) * recipe.variants
    folder.mkdir()
    for number in range(-(-samples // per_photo)):
        photo = photos[number % len(photos)]
        (folder / f"{photo.stem}-{number:05d}.jpg").symlink_to(photo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="deedsr")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    with tempfile.TemporaryDirectory() as work:
        sources = Path(work) / "sources"
        link_sources(sources, recipe, options.samples)
        alone = open_storage(f"{work}/alone")
        plans = list(plan_shards(list_sources([str(sources)]), recipe))
        wall, cpu = time.perf_counter(), time.process_time()
        records = [FromSources(recipe).build(plan, alone) for plan in plans]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        samples = sum(record.samples for record in records)
        job = generate([str(sources)], f"{work}/job", recipe, options.workers)
        same = {record.name for record in records if record.name} == {p.name for p in Path(work, "job").glob("*.tar")}
        assert same, "the job and the thread made different shards"
    result = {
        "recipe": recipe.name,
        "samples": samples,
        "shards": len(records),
        "workers": options.workers,
        "thread_samples_per_second": round(samples / wall, 2),
        "thread_cpu_share": round(cpu / wall, 3),
        "job_samples_per_second": round(job.samples_per_second, 2),
        "job_start_up_seconds": job.start_up_seconds,
        "job_seconds": job.seconds,
        "speed_up": round(job.samples_per_second / (samples / wall), 3),
    }
    print(f"{samples} samples, {len(records)} shards, recipe {recipe.name}")
    print(f"{'':24}{'samples/s':>12}{'seconds':>12}{'start-up s':>12}")
    print(f"{'one thread':24}{samples / wall:12.1f}{wall:12.1f}{'':>12}")
    row = f"{job.samples_per_second:12.1f}{job.seconds - job.start_up_seconds:12.1f}{job.start_up_seconds:12.1f}"
    print(f"{f'job, {options.workers} workers':24}{row}")
    print(f"speed-up {result['speed_up']:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
