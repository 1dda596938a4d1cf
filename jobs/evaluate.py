"""Measure a model and bicubic interpolation on the same pairs of a dataset."""

import dataclasses
from typing import Literal

from jsonargparse.typing import PositiveInt

from jobs.command import Command, Outcome
from jobs.sampling import SamplingOptions


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions(SamplingOptions):
    model: str  # what `train adapter` wrote: folder, URI or models:/NAME/VERSION; or tiny
    data: str  # degradation shards
    out: str  # where figures and pictures go: folder or s3://bucket/prefix
    metrics: str = "psnr,ssim,niqe"  # names, separated by commas
    split: Literal["validation", "train"] = "validation"  # which part of the dataset
    limit: PositiveInt | None = None  # at most so many pairs, evenly spread; null = all
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = a CUDA GPU if there is one, on a cluster always
    experiment: str = "deedsr-evaluation"  # MLflow experiment


def run(options: EvaluateOptions) -> Outcome:
    from pipelines.evaluation import evaluate

    result = evaluate(
        options.model,
        options.data,
        options.out,
        metrics=[name.strip() for name in options.metrics.split(",") if name.strip()],
        split=options.split,
        limit=options.limit,
        device=options.device,
        experiment=options.experiment,
        **options.sampling(),
    )
    return Outcome(dataclasses.asdict(result))


COMMAND = Command(
    EvaluateOptions, run, example="deedsr evaluate --model tiny --data shards --out evaluation --metrics psnr,ssim"
)
