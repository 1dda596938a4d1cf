"""Look at a dataset: one HTML page with pairs and their draws, every parameter's histogram, severity, and rejects."""

import dataclasses

from jsonargparse.typing import NonNegativeInt, PositiveInt

from jobs.command import Command, Outcome


@dataclasses.dataclass
class InspectOptions:
    uri: str  # dataset: folder or s3://bucket/prefix
    out: str = "inspection.html"  # page to write: file or s3://bucket/page.html
    samples: PositiveInt = 24  # pairs on the page
    seed: NonNegativeInt = 0  # chooses the pairs


def run(options: InspectOptions) -> Outcome:
    from pipelines.inspection import inspect

    result = inspect(options.uri, options.out, options.samples, options.seed)
    return Outcome(dataclasses.asdict(result))


COMMAND = Command(InspectOptions, run, operand="uri", example="deedsr inspect s3://photos/shards --out shards.html")
