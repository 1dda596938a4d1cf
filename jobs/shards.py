"""Make degradation shards: crop photographs, degrade the crops, write the pairs as WebDataset tars.

The same command again reuses every finished shard whose sources, recipe and algorithm are unchanged. With --pairs,
real LR pictures that are matched by name, nothing is degraded. In place of --source: --hr-from makes new degradations
of the HR that a dataset holds, and writes LR only; --join writes such a dataset with its HR, self-contained. --plan
makes nothing and estimates size, time and cost. --gc alone deletes leftovers of old versions and killed runs in --out,
unless other datasets depend on them; --gc --dry-run lists them.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import NonNegativeFloat, PositiveInt

from deedsr.errors import UsageError
from jobs.command import Command, Outcome
from pipelines import tracking

if TYPE_CHECKING:
    from deedsr.dataset.recipe import Recipe
    from pipelines.data.dataset import Dataset
    from pipelines.shards import ShardsResult
    from pipelines.shards.generate import Job

logger = logging.getLogger(__name__)
PICTURES = 4  # pairs that the MLflow run shows


@dataclasses.dataclass
class ShardsOptions:
    out: Annotated[str, "the dataset: folder or s3://bucket/prefix"]
    source: Annotated[list[str], "folders, URIs, lists, tars or Parquet"] = dataclasses.field(default_factory=list)
    pairs: Annotated[list[str], "LR folder of real pairs, or one per source"] = dataclasses.field(default_factory=list)
    hr_from: Annotated[str | None, "dataset whose HR images get new degradations"] = None
    join: Annotated[str | None, "dataset made by --hr-from, to be written with its HR images"] = None
    recipe: Annotated[str | dict[str, Any], "name (deedsr, light, medium, heavy, ...), YAML file or its content"] = (
        "deedsr"
    )
    workers: Annotated[PositiveInt | None, "CPUs to use; null = all of the cluster"] = None
    plan: Annotated[bool, "only estimate size and duration from a short measured probe"] = False
    nodes: Annotated[PositiveInt, "plan: number of machines"] = 1
    cores: Annotated[PositiveInt | None, "plan: CPU cores per machine; null = as many as this one has"] = None
    price: Annotated[NonNegativeFloat | None, "plan: price of one machine per hour"] = None
    gc: Annotated[bool, "at the end, delete objects in --out that the manifest does not name"] = False
    dry_run: Annotated[bool, "with --gc alone: list what would be deleted"] = False
    force: Annotated[bool, "with --gc: also delete what datasets made from older versions need"] = False
    tracking: Annotated[bool, "log an MLflow run"] = True
    experiment: Annotated[str, "MLflow experiment"] = "deedsr-shards"


def run(options: ShardsOptions) -> Outcome:
    from deedsr.dataset.recipe import load_recipe
    from pipelines.shards import run_job

    check(options)
    if not (options.source or options.hr_from or options.join):
        return _collected(options)
    recipe = load_recipe(options.recipe)
    if options.plan:
        return _planned(options, recipe)
    make = lambda run: run_job(job(options), options.workers)
    config = dataclasses.asdict(options) | ({} if options.join else {"recipe": recipe.model_dump(mode="json")})
    outcome = tracked(options, "shards", make, config=config, tags={"deedsr.recipe.digest": recipe.digest})
    if not options.gc:
        return Outcome(outcome)
    collected = _collected(options)
    return Outcome({**outcome, **collected.values}, complete=collected.complete)


def check(options: ShardsOptions) -> None:
    """Raises UsageError for options that exclude each other or have no effect together."""
    given = [name for name in ("source", "hr_from", "join") if getattr(options, name)]
    if len(given) > 1 or not (given or options.gc):
        raise UsageError("give one of --source, --hr-from and --join" + (", not several" if given else ""))
    if options.pairs and not options.source:
        raise UsageError("--pairs gives the LR partners of the pictures of --source: give that as well")
    defaults = {field.name: field.default for field in dataclasses.fields(ShardsOptions)}
    if options.dry_run and (given or not options.gc):
        raise UsageError("--dry-run goes with --gc alone; --plan says what making shards would take")
    if options.force and not options.gc:
        raise UsageError("--force is for --gc: give both, or neither")
    idle = [] if options.plan else ["nodes", "cores", "price"]
    where = "without --plan"
    if options.join:
        idle, where = [*idle, "recipe"], "with --join, which keeps the recipe of its dataset"
    if options.plan:
        idle, where = ["gc", "workers"], "with --plan, which makes nothing"
    for name in idle:
        if getattr(options, name) != defaults[name]:
            raise UsageError(f"--{name} {getattr(options, name)} has no effect {where}: leave it out")


def job(options: ShardsOptions) -> "Job":
    from deedsr.dataset.recipe import load_recipe
    from pipelines.shards.generate import hr_job, join_job, source_job

    if options.join:
        return join_job(options.join, options.out)
    recipe = load_recipe(options.recipe)
    if options.hr_from:
        return hr_job(options.hr_from, options.out, recipe)
    return source_job(options.source, options.out, recipe, options.pairs, options.workers)


def _planned(options: ShardsOptions, recipe: "Recipe") -> Outcome:
    from pipelines.shards import estimate

    if not options.source:
        raise UsageError("--plan goes with --source")
    size = {name: getattr(options, name) for name in ("pairs", "nodes", "cores", "price")}
    planned = estimate(options.source, options.out, recipe, **size)
    return Outcome(dataclasses.asdict(planned), text=planned.text())


def _collected(options: ShardsOptions) -> Outcome:
    from pipelines.shards import HeldBack, collect_garbage

    try:
        garbage = collect_garbage(options.out, dry_run=options.dry_run, force=options.force)
    except HeldBack as error:
        if not (options.source or options.hr_from or options.join):
            raise
        logger.error("error: %s", error)  # the dataset is made, and its figures are the result
        return Outcome({"held_by": [derived.uri for derived in error.held_by]}, complete=False)
    if options.dry_run:
        values = {
            "would_remove": [{"object": entry.path, "bytes": entry.size} for entry in garbage.objects],
            "bytes": garbage.bytes,
            "uploads": garbage.uploads,
            "held_by": [derived.uri for derived in garbage.held_by],
        }
        return Outcome(values, text=garbage.text())
    values = {"removed_objects": len(garbage.objects), "removed_bytes": garbage.bytes}
    return Outcome(values | {"removed_uploads": garbage.uploads})


def tracked(
    options: Any, kind: str, make: Callable[[tracking.Run | None], "ShardsResult"], **run_options: Any
) -> dict[str, Any]:
    """The result of `make`, which writes the dataset `options.out`, and its run, if any: dataset, figures, pairs."""
    from pipelines.data.dataset import Dataset

    if not options.tracking:
        return dataclasses.asdict(make(None))
    name = options.out.rstrip("/").rpartition("/")[2]
    tags = {"deedsr.kind": kind} | run_options.pop("tags", {})
    with tracking.start_run(options.experiment, name=name, tags=tags, out=options.out, **run_options) as run:
        result = make(run)
        dataset = Dataset.open(options.out)
        run.log_dataset(dataset, context=kind)
        run.log_metrics({k: v for k, v in dataclasses.asdict(result).items() if isinstance(v, int | float)})
        if dataset.manifest.latents is None:
            _log_pairs(run, dataset)
    return dataclasses.asdict(result) | {"run_id": run.id}


def _log_pairs(run: tracking.Run, dataset: "Dataset") -> None:
    """Some pairs as pictures: the LR enlarged beside its HR."""
    from pipelines.reports.page import picture_name, strip

    index = dataset.index("train")
    for row in range(0, index.num_rows, max(1, index.num_rows // PICTURES))[:PICTURES]:
        sample = dataset.read(index, row)
        source = sample.info["source"]["path"]
        name = f"pair-{picture_name(source, sample.key)}"
        run.log_picture(name, strip(source, sample.lr, {"HR": sample.hr}), step=0)


COMMAND = Command(
    ShardsOptions,
    run,
    tracked="shards",
    example="deedsr shards --source photos --out shards --recipe light --workers 2",
    check=check,
)
