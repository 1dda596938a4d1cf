"""Measure a model, bicubic interpolation and anybody's pictures side by side, with intervals.

Of degradation shards, of a folder of LR pictures (--data, with --reference for the HR), or of pictures alone
(`deedsr evaluate --pictures ours=SR theirs=SR2 --reference HR --out evaluation`); --pictures go with each. Names are
matched as `deedsr shards --pairs` does. A picture that cannot be measured is listed under `rejected`.
"""

import dataclasses

from jobs.command import Command, Outcome
from pipelines.inference.options import EvaluateOptions

SHOWN = 10  # rejected pictures; `results.json` has all


def run(options: EvaluateOptions) -> Outcome:
    from pipelines.inference.evaluation import TABLE, evaluate
    from pipelines.storage import open_storage

    result = evaluate(options)
    tables = open_storage(options.out).read(TABLE).decode()
    rejected = [f"rejected {key}: {reason}" for key, reason in result.rejected.items()]
    if len(rejected) > SHOWN:
        rejected[SHOWN:] = [f"and {len(rejected) - SHOWN} more"]
    text = "\n".join([tables, *rejected, f"{result.samples} pictures: {result.results}"])
    return Outcome(dataclasses.asdict(result), text, complete=not result.rejected)


def check(options: EvaluateOptions) -> None:
    """Refuses unknown metrics. Whether the node of the command has those of other packages is not known here."""
    from deedsr.metrics.registry import find

    for name in options.metric_names() or ():
        if ":" not in name:
            find(name)


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
