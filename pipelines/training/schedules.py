"""The learning rate of each optimizer step, on a schedule that keeps the length that the run began with."""

import logging
import math
from dataclasses import replace
from typing import Any

from pipelines.training.config import AdapterOptions, LearnerOptions, TrainOptions

logger = logging.getLogger(__name__)
LAST = 0.01  # of the peak: the rate at the end of the cosine, and after it


def learning_rate(train: TrainOptions, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant or cosine to 1 %."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    length = train.schedule_steps or train.max_steps
    progress = (step - train.warmup_steps) / max(1, length - train.warmup_steps)
    return train.lr * (LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def with_schedule(
    options: LearnerOptions | AdapterOptions, began: dict[str, Any] | None
) -> LearnerOptions | AdapterOptions:
    """`options` with the length of the cosine schedule: what is given, else that of the run `began` with the
    configuration of this record, else `train.max_steps`. Another number of steps than that is warned of."""
    train = options.train
    if train.schedule != "cosine":
        return options
    length = train.schedule_steps
    if length is None and began is not None and began["train"].get("schedule") == "cosine":
        length = recorded_length(began)
    length = length or train.max_steps
    if train.max_steps > length:
        logger.warning(
            "train.max_steps %d goes beyond the cosine schedule of %d steps (train.schedule_steps): from there on the "
            "learning rate stays at its end, %g; another schedule is another run, which may start from this one's "
            "weights by --init",
            train.max_steps, length, LAST * train.lr,
        )  # fmt: skip
    elif train.max_steps < length:
        logger.warning(
            "train.max_steps %d ends within the cosine schedule of %d steps (train.schedule_steps), at a learning rate "
            "of %g instead of %g",
            train.max_steps, length, learning_rate(replace(train, schedule_steps=length), train.max_steps - 1),
            LAST * train.lr,
        )  # fmt: skip
    return replace(options, train=replace(train, schedule_steps=length))


def recorded_length(began: dict[str, Any]) -> int:
    """The cosine's length in the configuration that a run began with; before there was the option, its steps."""
    return began["train"].get("schedule_steps") or began["train"]["max_steps"]
