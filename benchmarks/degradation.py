"""Speed of degrading 512 px crops on one thread, by step, beside a plain transcription of the chain.

    python benchmarks/degradation.py [--recipe deedsr] [--crops 400] [--plain-crops 60]

Prints a table and, last, one JSON line. Both arms degrade the same crops by the same draws. `cpu` counts this thread's
processor time alone, which other work on the machine disturbs less than the wall clock.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import plain_degradation

from deedsr.dataset.keys import generator
from deedsr.degradation import chain, draw_degradation, load_recipe

SIDE = 512


class StepClock:
    """Sums the processor time of each step."""

    def __init__(self):
        self.seconds = defaultdict(float)

    @contextmanager
    def __call__(self, step):
        start = time.thread_time()
        yield
        self.seconds[step] += time.thread_time() - start


def textured_crops() -> list[np.ndarray]:
    """One 512 px crop of each shipped photograph."""
    photos = sorted(Path(str(files("deedsr") / "assets" / "photos")).glob("*/*.jpg"))
    images = [cv2.cvtColor(cv2.imread(str(photo)), cv2.COLOR_BGR2RGB) for photo in photos]
    return [np.ascontiguousarray(image[200 : 200 + SIDE, 300 : 300 + SIDE]) for image in images]


def package_arm(hr, draws, clock):
    timed = {}
    for name, step in chain._STEPS.items():

        def run(image, name=name, step=step, **parameters):
            with clock(name):
                return step(image, **parameters)

        timed[name] = run
    original, chain._STEPS = chain._STEPS, timed
    try:
        return chain.degrade(hr, draws)
    finally:
        chain._STEPS = original


def measure(arm, ranges, crops, count, warm_up):
    """Processor and wall seconds of an arm over `count` samples, drawing included, and the clock of its steps."""
    clock = StepClock()
    for index in range(-warm_up, count):
        if index == 0:
            clock.seconds.clear()
            cpu, wall = time.thread_time(), time.perf_counter()
        with clock("draw"):
            draws = draw_degradation(ranges, (SIDE, SIDE), 4, generator("benchmark", index))
        arm(crops[index % len(crops)], draws, clock)
    return time.thread_time() - cpu, time.perf_counter() - wall, clock.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="deedsr")
    parser.add_argument("--crops", type=int, default=400, help="samples of the package's chain")
    parser.add_argument("--plain-crops", type=int, default=60, help="samples of the plain transcription")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    ranges, crops = load_recipe(options.recipe).degradation, textured_crops()

    arms = {
        "deedsr": (package_arm, options.crops),
        "plain": (plain_degradation.degrade, options.plain_crops),
    }
    result, steps = {"benchmark": "degradation", "recipe": options.recipe, "side": SIDE, "threads": 1}, {}
    for name, (arm, count) in arms.items():
        cpu, wall, seconds = measure(arm, ranges, crops, count, warm_up=20)
        steps[name] = {step: 1000 * value / count for step, value in seconds.items()}
        result[name] = {
            "crops": count,
            "crops_per_second": round(count / wall, 1),
            "crops_per_cpu_second": round(count / cpu, 1),
            "step_ms": {step: round(value, 3) for step, value in sorted(steps[name].items())},
        }
    print(f"{'ms per crop (cpu)':<20}" + "".join(f"{name:>10}" for name in arms))
    for step in ["draw", *chain._STEPS]:
        print(f"{step:<20}" + "".join(f"{steps[name].get(step, 0):>10.2f}" for name in arms))
    for key, label in (("crops_per_second", "crops/s (wall)"), ("crops_per_cpu_second", "crops/s (cpu)")):
        print(f"{label:<20}" + "".join(f"{result[name][key]:>10.1f}" for name in arms))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
