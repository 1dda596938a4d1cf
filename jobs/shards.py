"""Make degradation shards: crop photographs, degrade the crops, write the pairs as WebDataset tars.

The same command again reuses every finished shard whose sources, recipe and algorithm are unchanged.
"""

import dataclasses

from jsonargparse.typing import PositiveInt

from jobs.command import Command, Outcome


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

    result = generate(options.source, options.out, load_recipe(options.recipe), options.workers)
    return Outcome(dataclasses.asdict(result))


COMMAND = Command(ShardsOptions, run, example="deedsr shards --source photos --out shards --recipe light --workers 2")
