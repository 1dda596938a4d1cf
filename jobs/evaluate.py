"""Measure a model and bicubic interpolation on the same pairs of a dataset."""

import dataclasses
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from jobs.command import Command, Outcome
from jobs.sampling import SamplingOptions


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions(SamplingOptions):
    model: str  # what `train adapter` wrote: folder, URI or models:/NAME/VERSION; or tiny
    data: str  # degradation shards
    out: str  # where figures and pictures go: folder or s3://bucket/prefix
    base: str | None = None  # where the model's base lies: folder, URI or hub id; null = where the model says
    metrics: str = "psnr,ssim,niqe,niqe_set"  # names, separated by commas; what each is stands below
    metric_weights: str | None = None  # folder with weights files of lpips, dists and fid; null = only torch's cache
    border: NonNegativeInt = 0  # pixels that psnr and ssim leave out on each side; published figures leave out none
    split: Literal["validation", "train"] = "validation"  # which part of the dataset
    limit: PositiveInt | None = None  # at most so many pairs, evenly spread; null = all
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = a CUDA GPU if there is one, on a cluster always
    experiment: str = "deedsr-evaluation"  # MLflow experiment


def run(options: EvaluateOptions) -> Outcome:
    from pipelines.inference.evaluation import evaluate

    result = evaluate(
        options.model,
        options.data,
        options.out,
        base=options.base,
        metrics=[name.strip() for name in options.metrics.split(",") if name.strip()],
        metric_weights=options.metric_weights,
        border=options.border,
        split=options.split,
        limit=options.limit,
        device=options.device,
        experiment=options.experiment,
        **options.sampling(),
    )
    return Outcome(dataclasses.asdict(result))


def metrics() -> str:
    """What `--help` says of the metrics."""
    from deedsr.metrics.registry import described

    return f"metrics:\n{described()}"


COMMAND = Command(
    EvaluateOptions,
    run,
    example="deedsr evaluate --model tiny --data shards --out evaluation --metrics psnr,ssim",
    details=metrics,
)
