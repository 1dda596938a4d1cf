"""Presets of both stages, and the learning rate of each optimizer step.

The presets name networks, whose geometry is in `deedsr.learner` and `deedsr.adapter`, and set how they are trained. A
schedule keeps the length that the run began with.
"""

import logging
import math
from dataclasses import replace
from typing import Any

from pipelines.training.config import AdapterOptions, LearnerOptions, TrainOptions

logger = logging.getLogger(__name__)
LAST = 0.01  # of the peak: the rate at the end of the cosine, and after it

# `paper` follows docs/method.md, `fast` is the same networks on modern GPUs (docs/training.md), `tiny` what a laptop
# trains in minutes against the shipped base. All fix the micro-batch (`fast` at its first start), so that the number of
# workers changes not even the rounding.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "learner": {
        "paper": {
            "model": {"preset": "paper", "norm_group": 12},
            "contrast": {"queue_size": 24576, "momentum": 0.999, "temperature": 0.07, "batch_block": 24},
            "train": {
                "optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "global_batch_size": 96, "micro_batch_size": 24,
                "max_steps": 200_000, "checkpoint_every": 1000, "validate_every": 1000, "validation_samples": 256,
            },
        },
        "fast": {
            "model": {"preset": "paper", "norm_group": 16},
            "contrast": {
                "queue_size": 24576, "momentum": 0.999, "temperature": 0.07, "batch_block": 48, "batch_negatives": True,
            },
            "train": {
                "optimizer": "sgd", "lr": 0.12, "schedule": "cosine", "warmup_steps": 500, "weight_decay": 1e-4,
                "clip_grad_norm": 1.0, "global_batch_size": 384, "micro_batch_size": "auto", "max_steps": 50_000,
                "zero_stage": 2, "precision": "bf16", "exact_sums": False, "checkpoint_every": 500,
            },
        },
        "tiny": {
            "model": {"preset": "tiny"},
            "contrast": {
                "queue_size": 1024, "momentum": 0.99, "temperature": 0.1, "batch_block": 32, "batch_negatives": True,
            },
            "train": {
                "optimizer": "adamw", "lr": 2e-3, "schedule": "cosine", "warmup_steps": 20, "weight_decay": 1e-4,
                "global_batch_size": 64, "micro_batch_size": 32, "max_steps": 400, "checkpoint_every": 100,
                "validate_every": 100,
            },
        },
    },
    "adapter": {
        "paper": {
            "model": {"preset": "paper"},
            "train": {
                "lr": 1e-5, "global_batch_size": 128, "micro_batch_size": 2, "max_steps": 100_000, "zero_stage": 2,
                "checkpoint_every": 1000, "validate_every": 1000, "validation_samples": 64, "validation_pictures": 4,
            },
        },
        "fast": {
            "model": {"preset": "paper"},
            "diffusion": {"snr_gamma": 5.0},
            "train": {
                "lr": 1e-4, "schedule": "cosine", "warmup_steps": 1000, "clip_grad_norm": 1.0, "ema_decay": 0.999,
                "global_batch_size": 256, "micro_batch_size": "auto", "max_steps": 30_000, "zero_stage": 2,
                "precision": "bf16", "exact_sums": False, "checkpoint_every": 500,
            },
        },
        "tiny": {
            "model": {"preset": "tiny"},
            "diffusion": {"lr_crop": 32},
            "sampling": {"num_inference_steps": 20, "noise_guidance_share": 0.4},
            "train": {
                "lr": 1e-3, "schedule": "cosine", "warmup_steps": 50, "clip_grad_norm": 1.0, "ema_decay": 0.995,
                "global_batch_size": 8, "micro_batch_size": 4, "max_steps": 1000, "checkpoint_every": 100,
                "validate_every": 200, "validation_samples": 16,
            },
        },
    },
}  # fmt: skip


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
    train, end = replace(train, schedule_steps=length), LAST * train.lr
    schedule = f"the cosine schedule of {length} steps (train.schedule_steps)"
    if train.max_steps > length:
        logger.warning(
            "train.max_steps %d goes beyond %s: from there on the learning rate stays at its end, %g; another schedule "
            "is another run, which may start from this one's weights by --init", train.max_steps, schedule, end,
        )  # fmt: skip
    elif train.max_steps < length:
        rate = learning_rate(train, train.max_steps - 1)
        logger.warning(
            "train.max_steps %d ends within %s, at a learning rate of %g instead of %g",
            train.max_steps, schedule, rate, end,
        )  # fmt: skip
    return replace(options, train=train)


def recorded_length(began: dict[str, Any]) -> int:
    """The cosine's length in the configuration that a run began with; before there was the option, its steps."""
    return began["train"].get("schedule_steps") or began["train"]["max_steps"]
