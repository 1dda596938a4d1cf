"""How long a checkpoint stalls a training, and how long it takes to be committed in the background.

    python benchmarks/checkpoint_stall.py --data SHARDS [--stage adapter] [--steps 60] [--every 20] [--threads 1]

One worker without Ray, the `tiny` preset. Prints, last, one JSON line: median seconds of a step, of the stall, of the
background work, the checkpoint's bytes, and the steps' median while a checkpoint is written.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pipelines.data.dataset import Dataset
from pipelines.training.config import (
    AdapterModelOptions,
    AdapterOptions,
    ContrastOptions,
    DiffusionOptions,
    LearnerModelOptions,
    LearnerOptions,
    TrainOptions,
)
from pipelines.training.schedules import PRESETS


class Clock:
    """Stands where the MLflow run does."""

    def __init__(self):
        self.steps, self.stalls = {}, {}

    def log_metrics(self, values, step):
        now = time.time()
        if "checkpoint_stall_seconds" in values:
            self.stalls[step] = (now, values["checkpoint_stall_seconds"])
        else:
            self.steps[step] = now

    def logged(self):
        return []


def options(arguments, out: str):
    preset = PRESETS[arguments.stage]["tiny"]
    train = TrainOptions(**preset["train"] | {
        "max_steps": arguments.steps, "checkpoint_every": arguments.every, "log_every": 1,
        "keep_checkpoints": arguments.steps,
    })  # fmt: skip
    if arguments.stage == "learner":
        return LearnerOptions(arguments.data, out, model=LearnerModelOptions(**preset["model"]),
                              contrast=ContrastOptions(**preset["contrast"]), train=train)  # fmt: skip
    return AdapterOptions(arguments.data, "tiny", "tiny", out, model=AdapterModelOptions(**preset["model"]),
                          diffusion=DiffusionOptions(**preset["diffusion"]), train=train)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--stage", choices=["learner", "adapter"], default="adapter")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        from pipelines.training.loop import Loop, make_stage

        chosen, clock = options(arguments, f"{folder}/out"), Clock()
        dataset = Dataset.open(chosen.data)
        Loop(make_stage(chosen, dataset), dataset, torch.device("cpu"), clock).train()
        torch.distributed.destroy_process_group()
        records = sorted(Path(folder).glob("out/checkpoints/*/checkpoint.json"))
        committed = {json.loads(r.read_text())["step"]: r.stat().st_mtime for r in records}
        size = sum(path.stat().st_size for path in records[-1].parent.iterdir())
    took = {s: clock.steps[s] - clock.steps[s - 1] for s in clock.steps if s - 1 in clock.steps and s > 5}
    after = {s + 1 for s in committed}  # holds the stall too
    result = {
        "stage": arguments.stage,
        "step_seconds": statistics.median(t for s, t in took.items() if s not in after),
        "step_with_checkpoint_seconds": statistics.median(t for s, t in took.items() if s in after),
        "stall_seconds": statistics.median(stall for _, stall in clock.stalls.values()),
        "background_seconds": statistics.median(committed[s] - at for s, (at, _) in clock.stalls.items()),
        "bytes": size,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
