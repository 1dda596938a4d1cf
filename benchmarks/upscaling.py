"""`deedsr upscale --ray` with N workers against N plain commands that share out the same pictures, all of one thread.

    python -m benchmarks.upscaling [--workers 2] [--pictures 48] [--side 64] [--steps 10] [--rounds 2]

The arms take turns. A rate is that of the pictures after the first of each worker, so without start and model; whole
seconds are those of the command. What others compute on the machine meanwhile costs both arms, but not evenly: run it
on a quiet one. The results of both arms are compared byte by byte. Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from PIL import Image

GOAL = 0.9  # of the plain commands' rate


def make_pictures(folder: Path, count: int, side: int) -> list[Path]:
    """Crops of the shipped photographs, reduced by 2."""
    folder.mkdir()
    photos = sorted((Path(str(files("deedsr"))) / "assets" / "photos" / "train").glob("*.jpg"))
    paths = []
    for number in range(count):
        with Image.open(photos[number % len(photos)]) as photo:
            left, top = ((17 * number) % (size - 2 * side) for size in photo.size)
            crop = photo.crop((left, top, left + 2 * side, top + 2 * side)).resize((side, side), Image.Resampling.BOX)
        paths.append(folder / f"{number:04}.png")
        crop.save(paths[-1])
    return paths


def measure(commands: list[list[str]], out: Path, workers: int) -> tuple[float, float]:
    """(pictures per second, seconds of all) of commands that run at the same time and write to `out`."""
    began = time.time()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "deedsr", "upscale", *words, "--out", str(out)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for words in commands
    ]  # fmt: skip
    for process in running:
        said = process.communicate()[1]
        if process.returncode:
            raise SystemExit(f"a command failed: {said.strip().splitlines()[-1]}")
    done = sorted(path.stat().st_mtime for path in out.iterdir())
    return (len(done) - workers) / (done[-1] - done[workers - 1]), time.time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--side", type=int, default=64, help="pixels of a picture before it is enlarged")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        paths = make_pictures(Path(work) / "in", options.pictures, options.side)
        common = ["--steps", str(options.steps)]
        arms = {
            "plain": [[*map(str, paths[share :: options.workers]), *common] for share in range(options.workers)],
            "ray": [[str(Path(work) / "in"), *common, "--ray", "--workers", str(options.workers)]],
        }
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        equal = True
        for number in range(options.rounds):
            for name, commands in arms.items():
                out = Path(work) / f"{name}-{number}"
                figures[name].append(measure(commands, out, options.workers))
                equal &= all(p.read_bytes() == (Path(work) / "plain-0" / p.name).read_bytes() for p in out.iterdir())
    print(f"{options.workers} workers, {options.pictures} pictures of {options.side} px, {options.steps} steps")
    print(f"{'':8}{'pictures/s':>12}{'seconds of all':>16}")
    rates = {}
    for name, measured in figures.items():
        rates[name], seconds = (statistics.median(values) for values in zip(*measured, strict=True))
        print(f"{name:8}{rates[name]:12.2f}{seconds:16.1f}")
    efficiency = rates["ray"] / rates["plain"]
    print(f"efficiency {efficiency:.2f} (goal {GOAL}), results {'equal' if equal else 'NOT EQUAL'}")
    print(json.dumps({"rates": rates, "efficiency": round(efficiency, 3), "goal": GOAL, "equal": equal,
                      "rounds": figures}))  # fmt: skip


if __name__ == "__main__":
    main()
