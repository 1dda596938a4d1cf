"""Measure a model, bicubic interpolation and anybody's pictures side by side, with intervals.

Of degradation shards, of a folder of LR pictures (--data, with --reference for the HR), or of pictures alone
(`deedsr evaluate --pictures ours=SR theirs=SR2 --reference HR --out evaluation`); --pictures go with each. Names are
matched as `deedsr shards --pairs` does. A picture that cannot be measured is listed under `rejected`.
"""

import dataclasses
from typing import Annotated, Literal

from pydantic import NonNegativeInt, PositiveInt

from jobs.command import Command, Outcome
from jobs.sampling import SamplingOptions

SHOWN = 10  # rejected pictures; `results.json` has all


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions(SamplingOptions):
    out: Annotated[str, "output: folder or s3://bucket/prefix"]
    model: Annotated[str | None, "what `train adapter` wrote: folder, URI or models:/NAME/VERSION; or tiny"] = None
    data: Annotated[str | None, "degradation shards, or a folder of LR pictures"] = None
    reference: Annotated[str | None, "folder of HR pictures; null = metrics without reference, or the shards' HR"] = (
        None
    )
    pictures: Annotated[list[str], "NAME=FOLDER or FOLDER with enlarged pictures, any number of them"] = (
        dataclasses.field(default_factory=list)
    )
    metrics: Annotated[str | None, "comma-separated names, listed below; null = psnr,ssim,niqe,niqe_set"] = None
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "of the model's networks"] = "fp32"
    metric_weights: Annotated[str | None, "folder with weights of lpips, dists, fid; null = torch's cache"] = None
    border: Annotated[NonNegativeInt, "pixels per side that psnr and ssim leave out; 0 for published figures"] = 0
    split: Annotated[Literal["validation", "train"], "split of the dataset"] = "validation"
    limit: Annotated[PositiveInt | None, "maximum number of pictures, evenly spread; null = all"] = None
    experiment: Annotated[str, "MLflow experiment"] = "deedsr-evaluation"


def run(options: EvaluateOptions) -> Outcome:
    from pipelines.inference.evaluation import evaluate
    from pipelines.inference.figures import TABLE
    from pipelines.storage import open_storage

    result = evaluate(**dataclasses.asdict(options) | {"metrics": _names(options)})
    tables = open_storage(options.out).read(TABLE).decode()
    rejected = [f"rejected {key}: {reason}" for key, reason in result.rejected.items()]
    if len(rejected) > SHOWN:
        rejected[SHOWN:] = [f"and {len(rejected) - SHOWN} more"]
    text = "\n".join([tables, *rejected, f"{result.samples} pictures: {result.results}"])
    return Outcome(dataclasses.asdict(result), text, complete=not result.rejected)


def check(options: EvaluateOptions) -> None:
    """Refuses unknown metrics. Whether the node of the command has those of other packages is not known here."""
    from deedsr.metrics.registry import find

    for name in _names(options) or ():
        if ":" not in name:
            find(name)


def _names(options: EvaluateOptions) -> list[str] | None:
    if options.metrics is None:
        return None
    return [name.strip() for name in options.metrics.split(",") if name.strip()]


def metrics() -> str:
    """List of the metrics in `--help`."""
    from deedsr.metrics.registry import described

    return f"metrics:\n{described()}"


COMMAND = Command(
    EvaluateOptions,
    run,
    tracked="evaluate",
    example="deedsr evaluate --model tiny --data shards --out evaluation --metrics psnr,ssim\n"
    "  deedsr evaluate --pictures ours=SR theirs=SR2 --reference HR --out evaluation",
    details=metrics,
    check=check,
)
