"""Put MLflow runs side by side: what differs between them, then their results by the data they were taken on.

Runs are named by id, the beginning of an id, or name; without any, all of the experiments are taken, as far as --filter
and --last go. Evaluations are shown with the settings of the models that they measured, best first.
"""

import dataclasses
from typing import Annotated

from pydantic import PositiveInt

from deedsr.errors import UsageError
from jobs.command import Command, Outcome


@dataclasses.dataclass
class RunsOptions:
    """Which runs of the store."""

    experiment: Annotated[str | None, "MLflow experiment; null = every one whose name begins with deedsr-"] = None
    filter: Annotated[str | None, 'condition of MLflow, such as "metrics.\\`model.psnr\\` > 25"'] = None
    last: Annotated[PositiveInt | None, "maximum number of runs, the newest; null = all"] = None


@dataclasses.dataclass
class CompareOptions(RunsOptions):
    run: Annotated[list[str], "runs to compare: ids or names"] = dataclasses.field(default_factory=list)
    out: Annotated[str | None, "page to write: file or s3://bucket/page.html; null = tables only"] = None


def check(options: CompareOptions) -> None:
    if options.run and (options.experiment or options.filter or options.last):
        raise UsageError("give runs, or --experiment, --filter and --last, not both")


def run(options: CompareOptions) -> Outcome:
    from pipelines.reports.comparison import compare

    check(options)
    result = compare(options.experiment, options.out, runs=options.run, condition=options.filter, last=options.last)
    return Outcome({"runs": result.runs, "page": result.page}, text=result.text())


COMMAND = Command(
    CompareOptions,
    run,
    operand="run",
    check=check,
    example="deedsr compare --experiment deedsr-learner --last 10 --out learners.html",
)
