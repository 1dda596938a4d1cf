"""Make degradation shards: crop photographs, degrade the crops, write the pairs as WebDataset tars.

The same command again reuses every finished shard whose sources, recipe and algorithm are unchanged.
"""

import dataclasses
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from jobs.command import Command, Outcome

if TYPE_CHECKING:
    from deedsr.degradation.recipe import Recipe
    from pipelines.dataset import Dataset
    from pipelines.shards import ShardsResult
    from pipelines.tracking import Run

PICTURES = 4  # pairs that the MLflow run shows


@dataclasses.dataclass
class ShardsOptions:
    source: list[str]  # folders, s3:// prefixes or text files that list pictures
    out: str  # the dataset: folder or s3://bucket/prefix
    recipe: str = "deedsr"  # deedsr, realesrgan, light, medium, heavy, demo or a YAML file
    workers: PositiveInt | None = None  # tasks at a time; null = every CPU of the cluster
    tracking: bool = True  # log an MLflow run
    experiment: str = "deedsr-shards"  # MLflow experiment


def run(options: ShardsOptions) -> Outcome:
    from deedsr.degradation.recipe import load_recipe
    from pipelines.shards import generate

    recipe = load_recipe(options.recipe)
    if options.tracking:
        return _run_tracked(options, recipe)
    return Outcome(dataclasses.asdict(generate(options.source, options.out, recipe, options.workers)))


def _run_tracked(options: ShardsOptions, recipe: "Recipe") -> Outcome:
    from pipelines import tracking
    from pipelines.dataset import Dataset
    from pipelines.shards import generate

    with tracking.start_run(
        options.experiment,
        name=options.out.rstrip("/").rpartition("/")[2],
        config=dataclasses.asdict(options) | {"recipe": recipe.model_dump(mode="json")},
        tags={"deedsr.kind": "shards", "deedsr.recipe.digest": recipe.digest},
    ) as run:
        result = generate(options.source, options.out, recipe, options.workers)
        _log(run, result, Dataset.open(options.out))
    return Outcome(dataclasses.asdict(result) | {"run_id": run.id})


def _log(run: "Run", result: "ShardsResult", dataset: "Dataset") -> None:
    """Figures of the generation, the dataset's digest, and some pairs: the LR enlarged beside its HR."""
    import numpy as np

    run.log_dataset(dataset, context="shards")
    numbers = {key: value for key, value in dataclasses.asdict(result).items() if isinstance(value, int | float)}
    run.log_metrics(numbers)
    index = dataset.index("train")
    for row in range(0, index.num_rows, max(1, index.num_rows // PICTURES))[:PICTURES]:
        sample = dataset.read(index, row)
        enlarged = sample.lr.repeat(dataset.scale, axis=0).repeat(dataset.scale, axis=1)
        run.log_picture(f"pair-{sample.key}", np.hstack([enlarged, sample.hr]))


COMMAND = Command(ShardsOptions, run, example="deedsr shards --source photos --out shards --recipe light --workers 2")
