"""Stage 2: train the degradation-aware adapter around a frozen diffusion model.

The same command with the same --out continues from the last checkpoint, and does nothing when it is already done.
"""

import dataclasses

from jobs.command import Command, Outcome
from pipelines.training.config import AdapterOptions, check
from pipelines.training.schedules import PRESETS


def run(options: AdapterOptions) -> Outcome:
    from pipelines.training.launch import train_adapter

    return Outcome(dataclasses.asdict(train_adapter(options)))


COMMAND = Command(
    AdapterOptions,
    run,
    tracked="train adapter",
    presets=PRESETS["adapter"],
    check=check,
    example="deedsr train adapter --data shards --learner runs/learner --base tiny --out runs/adapter --preset tiny",
)
