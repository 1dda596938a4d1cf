"""Look at a dataset: one HTML page with pairs and their draws, every parameter's histogram, severity, and rejects.

With --against, compares with an older dataset: samples added, removed and changed, the distributions of sampled
parameters, the differing recipe keys, and the same sources in both.
"""

import dataclasses
from typing import Annotated

from pydantic import NonNegativeInt, PositiveInt

from jobs.command import Command, Outcome


@dataclasses.dataclass
class InspectOptions:
    uri: Annotated[str, "dataset: folder or s3://bucket/prefix"]
    out: Annotated[str, "HTML page to write: file or s3://bucket/page.html"] = "inspection.html"
    samples: Annotated[PositiveInt, "pairs on the page"] = 24
    seed: Annotated[NonNegativeInt, "seed that selects the pairs"] = 0
    against: Annotated[str | None, "older dataset to compare with"] = None
    tracking: Annotated[bool, "with --against: attach the page to the dataset's MLflow run"] = True


def run(options: InspectOptions) -> Outcome:
    from pipelines.reports.inspection import inspect

    if options.against is not None:
        return _compared(options, options.against)

    result = inspect(options.uri, options.out, options.samples, options.seed)
    return Outcome(dataclasses.asdict(result))


def _compared(options: InspectOptions, against: str) -> Outcome:
    from pipelines.reports.difference import inspect_against

    found = inspect_against(options.uri, against, options.out, options.samples, options.seed, log=options.tracking)
    values = dataclasses.asdict(found)
    moved = sorted(found.parameters.items(), key=lambda item: -(item[1]["moved"] or 0))[:5]
    short = {"recipe": {key: f"{old} -> {new}" for key, (old, new) in found.recipe.items()}} if found.recipe else {}
    short |= {"parameters": {name: f"{100 * (one['moved'] or 0):.1f} % moved" for name, one in moved}}
    return Outcome(values, text=str(Outcome({**values, **short})))


COMMAND = Command(InspectOptions, run, operand="uri", example="deedsr inspect s3://photos/shards --out shards.html")
