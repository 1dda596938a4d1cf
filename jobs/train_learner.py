"""Stage 1: train the degradation learner by momentum contrast on degradation shards.

The same command with the same --out continues from the last checkpoint, and does nothing when it is already done.
"""

import dataclasses

from jobs.command import Command, Outcome
from pipelines.training.config import LearnerOptions, check
from pipelines.training.schedules import PRESETS


def run(options: LearnerOptions) -> Outcome:
    from pipelines.training.launch import train_learner

    return Outcome(dataclasses.asdict(train_learner(options)))


COMMAND = Command(
    LearnerOptions,
    run,
    tracked="train learner",
    presets=PRESETS["learner"],
    check=check,
    example="deedsr train learner --data shards --out runs/learner --preset tiny --train.max_steps 400",
)
