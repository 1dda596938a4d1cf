"""Put the runs of an MLflow experiment side by side: configuration differences, curves, metrics, pictures."""

import dataclasses

from jobs.command import Command, Outcome


@dataclasses.dataclass
class CompareOptions:
    experiment: str = "deedsr-evaluation"  # MLflow experiment
    out: str = "comparison.html"  # the page


def run(options: CompareOptions) -> Outcome:
    from pipelines.comparison import compare

    return Outcome(dataclasses.asdict(compare(**dataclasses.asdict(options))))


COMMAND = Command(CompareOptions, run, example="deedsr compare --experiment deedsr-learner --out learners.html")
