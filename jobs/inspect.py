"""Look at a dataset: one HTML page with pairs and their draws, every parameter's histogram, severity, and rejects.

With --against, what regenerating changed since an older dataset: samples added, gone and changed, what was drawn in
both, the difference of the recipes, and the same sources under both.
"""

import dataclasses

from jsonargparse.typing import NonNegativeInt, PositiveInt

from jobs.command import Command, Outcome


@dataclasses.dataclass
class InspectOptions:
    uri: str  # dataset: folder or s3://bucket/prefix
    out: str = "inspection.html"  # page to write: file or s3://bucket/page.html
    samples: PositiveInt = 24  # pairs on the page
    seed: NonNegativeInt = 0  # chooses the pairs
    against: str | None = None  # an older dataset: the page says what changed since
    tracking: bool = True  # with --against: the MLflow run that made the dataset gets the page as a picture


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
