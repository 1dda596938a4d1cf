"""Measure a model and bicubic interpolation on the same pairs of a dataset."""

import dataclasses
from typing import Annotated, Literal

from pydantic import NonNegativeInt, PositiveInt

from jobs.command import Command, Outcome
from jobs.sampling import SamplingOptions


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions(SamplingOptions):
    model: Annotated[str, "what `train adapter` wrote: folder, URI or models:/NAME/VERSION; or tiny"]
    data: Annotated[str, "degradation shards"]
    out: Annotated[str, "output: folder or s3://bucket/prefix"]
    metrics: Annotated[str, "comma-separated names, which are listed below"] = "psnr,ssim,niqe,niqe_set"
    metric_weights: Annotated[str | None, "folder with weights of lpips, dists and fid; null = torch's cache"] = None
    border: Annotated[NonNegativeInt, "pixels per side that psnr and ssim leave out; 0 for published figures"] = 0
    split: Annotated[Literal["validation", "train"], "split of the dataset"] = "validation"
    limit: Annotated[PositiveInt | None, "maximum number of pairs, evenly spread; null = all"] = None
    experiment: Annotated[str, "MLflow experiment"] = "deedsr-evaluation"


def run(options: EvaluateOptions) -> Outcome:
    from pipelines.inference.evaluation import evaluate

    result = evaluate(**dataclasses.asdict(options) | {"metrics": _names(options)})
    return Outcome(dataclasses.asdict(result))


def check(options: EvaluateOptions) -> None:
    """Refuses unknown metrics. Whether the node of the command has those of other packages is not known here."""
    from deedsr.metrics.registry import find

    for name in _names(options):
        if ":" not in name:
            find(name)


def _names(options: EvaluateOptions) -> list[str]:
    return [name.strip() for name in options.metrics.split(",") if name.strip()]


def metrics() -> str:
    """List of the metrics in `--help`."""
    from deedsr.metrics.registry import described

    return f"metrics:\n{described()}"


COMMAND = Command(
    EvaluateOptions,
    run,
    tracked="evaluate",
    example="deedsr evaluate --model tiny --data shards --out evaluation --metrics psnr,ssim",
    details=metrics,
    check=check,
)
