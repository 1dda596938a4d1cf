"""Measure a model and bicubic interpolation on the same pairs of a dataset."""

import dataclasses

from jsonargparse.typing import NonNegativeInt, PositiveInt

from jobs.command import Command, Outcome


@dataclasses.dataclass
class EvaluateOptions:
    model: str  # folder or URI written by `train adapter`, or tiny
    data: str  # degradation shards
    out: str  # where the figures and pictures go
    metrics: str = "psnr,ssim,niqe"  # names, separated by commas
    split: str = "validation"  # train or validation
    steps: PositiveInt | None = None  # sampling steps; null = what the model was made with
    seed: NonNegativeInt = 0  # of the sampling noise
    experiment: str = "deedsr-evaluation"  # MLflow experiment


def run(options: EvaluateOptions) -> Outcome:
    from pipelines.evaluation import evaluate

    return Outcome(dataclasses.asdict(evaluate(**dataclasses.asdict(options))))


COMMAND = Command(
    EvaluateOptions, run, example="deedsr evaluate --model tiny --data shards --out evaluation --metrics psnr,ssim"
)
