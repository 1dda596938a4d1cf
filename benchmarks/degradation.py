"""Speed of degrading 512 px crops on one thread, by step, beside a plain transcription of the chain.

    python benchmarks/degradation.py [--recipe deedsr] [--crops 300] [--plain-crops 60] [--rounds 3]

Prints a table and, last, one JSON line. Both arms degrade the same crops by the same draws, in turns. `cpu` counts this
thread's processor time alone, which other work on the machine disturbs less than the wall clock. Each figure is the
best of the rounds.
"""

import argparse
import json
import math
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
from deedsr.dataset.recipe import load_recipe
from deedsr.degradation import chain, draw_degradation
from deedsr.degradation.chain import prepare_worker

SIDE = 512
GOAL, PLAIN_AT_GOAL = 90, 30  # crops/s, on a machine where a plain chain made 30


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


def measure(arm, ranges, crops, count):
    """Milliseconds per crop: processor and wall time of an arm over `count` samples, drawing included, and by step."""
    clock = StepClock()
    cpu, wall = time.thread_time(), time.perf_counter()
    for index in range(count):
        with clock("draw"):
            draws = draw_degradation(ranges, (SIDE, SIDE), 4, generator("benchmark", index))
        arm(crops[index % len(crops)], draws, clock)
    clock.seconds |= {"cpu": time.thread_time() - cpu, "wall": time.perf_counter() - wall}
    return {name: 1000 * seconds / count for name, seconds in clock.seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="deedsr")
    parser.add_argument("--crops", type=int, default=300, help="samples of the package's chain")
    parser.add_argument("--plain-crops", type=int, default=60, help="samples of the plain transcription")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prepare_worker()
    torch.set_num_threads(1)
    ranges, crops = load_recipe(options.recipe).degradation, textured_crops()
    arms = {
        "deedsr": (package_arm, options.crops),
        "plain": (plain_degradation.degrade, options.plain_crops),
    }
    best = {}
    for name, (arm, _) in arms.items():
        best[name] = measure(arm, ranges, crops, 20)  # warm up
    for _ in range(options.rounds):
        for name, (arm, count) in arms.items():
            measured = measure(arm, ranges, crops, count)
            best[name] = {step: min(best[name].get(step, math.inf), measured[step]) for step in measured}

    result = {"benchmark": "degradation", "recipe": options.recipe, "side": SIDE, "threads": 1}
    for name, (_, count) in arms.items():
        steps = {step: round(best[name].get(step, 0.0), 3) for step in ["draw", *chain._STEPS]}
        rates = {f"crops_per_{kind}_second": round(1000 / best[name][kind], 1) for kind in ("wall", "cpu")}
        result[name] = {"crops": count, **rates, "step_ms": steps}
    print(f"{'ms per crop (cpu)':<20}" + "".join(f"{name:>10}" for name in arms))
    for step in ["draw", *chain._STEPS]:
        print(f"{step:<20}" + "".join(f"{result[name]['step_ms'][step]:>10.2f}" for name in arms))
    for kind in ("wall", "cpu"):
        row = "".join(f"{result[name][f'crops_per_{kind}_second']:>10.1f}" for name in arms)
        print(f"{f'crops/s ({kind})':<20}{row}")
    rate, plain = (result[name]["crops_per_cpu_second"] for name in ("deedsr", "plain"))
    result |= {"goal": GOAL, "times_plain": round(rate / plain, 2), "times_plain_goal": GOAL / PLAIN_AT_GOAL}
    print(
        f"goal {GOAL} crops/s, set on a machine where a plain chain made {PLAIN_AT_GOAL}, {GOAL / PLAIN_AT_GOAL:.1f} "
        f"times as many: here {rate:.0f}, {rate / plain:.1f} times the plain chain"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
