"""Put MLflow runs side by side: configuration differences, curves, pictures, and metrics by evaluated dataset."""

import dataclasses
from typing import Annotated

from jobs.command import Command, Outcome


@dataclasses.dataclass
class CompareOptions:
    experiment: Annotated[str | None, "MLflow experiment; null = every one whose name begins with deedsr-"] = None
    out: Annotated[str | None, "page to write: file or s3://bucket/page.html; null = tables only"] = None


def run(options: CompareOptions) -> Outcome:
    from pipelines.reports.comparison import compare

    result = compare(options.experiment, options.out)
    return Outcome({"runs": result.runs, "page": result.page}, text=result.text())


COMMAND = Command(CompareOptions, run, example="deedsr compare --experiment deedsr-learner --out learners.html")
