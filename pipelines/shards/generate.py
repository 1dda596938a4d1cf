"""The shards job: plan, build on Ray Data what is not committed yet, assemble."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain, zip_longest

from tqdm import tqdm

from deedsr.dataset.manifest import MANIFEST, SAMPLES, HRSource, kept_copy
from deedsr.dataset.recipe import Recipe
from deedsr.errors import DatasetNotCommitted, DeeDSRError, UsageError
from pipelines.claims import running
from pipelines.data.dataset import Dataset, no_validation, relative_place
from pipelines.data.index import require_hr
from pipelines.distribution import in_threads
from pipelines.placement import WorkPlan
from pipelines.shards.assemble import assemble, warn_of_versions
from pipelines.shards.build import FromHR, FromSources, Joined
from pipelines.shards.duplicates import mark_duplicates
from pipelines.shards.execute import Job, PlanParts, build_missing
from pipelines.shards.garbage import record_derived
from pipelines.shards.listing import listed
from pipelines.shards.plan import ShardPlan, derived_plan, plan_shards
from pipelines.shards.shard import Inventory, read_record, tar_name
from pipelines.shards.source import Source
from pipelines.storage import Storage, open_storage

logger = logging.getLogger(__name__)
_AHEAD = 32  # records read before they are needed


@dataclass(kw_only=True)
class ShardsResult:
    """Result of `deedsr shards`. `samples_per_second` counts new samples and leaves the start-up out."""

    manifest: str
    digest: str
    samples: int
    validation: int  # of the samples
    shards: int
    written: int = 0  # shards made by this run
    reused: int  # shards that were there
    rejected: int  # sources
    seconds: float = 0.0
    start_up_seconds: float = 0.0
    samples_per_second: float = 0.0


def source_job(
    sources: Sequence[str],
    out: str,
    recipe: Recipe,
    pairs: Sequence[str] = (),
    workers: int | None = None,
    progress: bool = True,
) -> Job:
    """Shards of the pictures in `sources` (see `list_sources`) or, with `pairs`, of real pairs (see `list_pairs`).

    `workers`, `progress`: of the search for duplicates, where the recipe rejects them.
    """

    def plans() -> Iterator[ShardPlan]:
        listing: Iterable[Source] = listed(sources, pairs, recipe.scale)
        if recipe.duplicates == "reject":
            listing = mark_duplicates(listing, workers, progress)
        return plan_shards(_matched(listing, recipe), recipe)

    return Job(plans, FromSources(recipe), open_storage(out), recipe)


def hr_job(hr_from: str, out: str, recipe: Recipe) -> Job:
    """New LR images of the HR that the dataset `hr_from` holds, and no HR.

    Of `recipe` only what concerns the degradation counts (`Recipe.degrading`).
    """
    dataset = Dataset.open(hr_from).require_pixels("--hr-from").hr_dataset()
    storage = open_storage(out)
    if storage.uri == dataset.uri:
        raise UsageError(f"--out {storage.uri} is the dataset that the HR comes from: choose another")
    recipe = dataset.recipe.degrading(recipe)
    hr = HRSource(dataset.digest, relative_place(dataset.uri, storage.uri))
    work = FromHR(recipe, dataset.storage, index_of(dataset))
    return Job(derived_plans(dataset, recipe.digest), work, storage, recipe, dataset, hr_from=hr)


def join_job(lr_dataset: str, out: str) -> Job:
    """The pairs of a dataset that takes its HR from another, self-contained.

    Its digest is that of a dataset made with the same recipe from the sources.
    """
    dataset = Dataset.open(lr_dataset).require_pixels("--join")
    storage = open_storage(out)
    if dataset.manifest.hr_from is None:
        raise UsageError(f"{dataset.uri} holds its HR images itself: there is nothing to join")
    if storage.uri in (dataset.uri, dataset.hr_dataset().uri):
        raise UsageError(f"--out {storage.uri} is one of the datasets to join: choose another")
    require_hr(dataset)
    work = Joined(dataset.storage, index_of(dataset), dataset.hr_dataset().storage)
    return Job(derived_plans(dataset, "join"), work, storage, dataset.recipe, dataset)


def derived_plans(dataset: Dataset, work: str) -> Callable[[], Iterator[ShardPlan]]:
    return lambda: (derived_plan(shard, work) for shard in dataset.manifest.shards)


def generate(
    sources: Sequence[str],
    out: str,
    recipe: Recipe,
    workers: int | None = None,
    progress: bool = True,
    pairs: Sequence[str] = (),
) -> ShardsResult:
    """Makes or completes the dataset `out` of `source_job`."""
    return run_job(source_job(sources, out, recipe, pairs, workers, progress), workers, progress)


def _matched(listing: Iterable[Source], recipe: Recipe) -> Iterator[Source]:
    """Passes the sources on, then warns of patterns of the recipe that matched none of them."""
    waiting = dict.fromkeys(recipe.split.validation_patterns, "split.validation_patterns")
    waiting |= {weight.pattern: "weights" for weight in recipe.weights}
    for source in listing:
        for pattern in [pattern for pattern in waiting if fnmatchcase(source.path, pattern)]:
            del waiting[pattern]
        yield source
    for pattern, key in waiting.items():
        logger.warning("recipe %s: the pattern %r of %s matches no source", recipe.name, pattern, key)


def run_job(
    job: Job, workers: int | None = None, progress: bool = True, actors: WorkPlan | None = None
) -> ShardsResult:
    """Makes the shards that the job plans and its place does not hold, and the dataset of all of them.

    `workers`: CPUs in use at a time, None for all of the cluster's; `actors`: shards are made in actors of this plan.
    Raises UsageError for sources or a place that cannot be used, DeeDSRError if the work failed; what was committed
    stays, and the same call continues from there.
    """
    out, split = job.out, job.recipe.split
    begin = time.time()
    warn_of_versions()
    out.require_writable()
    before = out.version(MANIFEST)
    rest = iter(job.plans())
    first = next(rest)  # raises for unusable sources before anything is written
    with running(out) as folder:
        if job.made_of:
            record_derived(job.made_of, out)
        inventory = Inventory.of(out)
        parts = PlanParts(folder)
        every = chain([first], rest)
        parts.write(tqdm(every, unit="shard", desc="plan", disable=not progress, leave=False), inventory)
        unit, total, done = ("source", parts.sources, parts.reused_sources)
        if not parts.sources:  # shards made of shards
            unit, total, done = "shard", parts.shards, parts.shards - parts.missing_shards
        first_start, built, written = time.time(), 0, 0
        with tqdm(total=total, initial=done, unit=unit, desc="shards", disable=not progress) as bar:
            for shard in build_missing(parts, job, workers, actors):
                first_start = shard.started if not built else min(first_start, shard.started)
                built += shard.samples
                written += shard.samples > 0
                inventory.records[shard.id] = shard.key
                bar.set_postfix_str(f"{built / max(time.time() - first_start, 1e-3):.1f} samples/s", refresh=False)
                bar.update(shard.sources if unit == "source" else 1)
        _require_tars(parts, inventory, out)
        records = in_threads(lambda plan: read_record(inventory.record(plan), out), parts, 16, _AHEAD)
        manifest, sums = assemble(job, zip(parts, records, strict=True), before)
    if not (job.made_of or sums.splits["validation"]) and (split.validation_patterns or split.validation_share):
        logger.warning("%s", no_validation(out.uri, job.recipe))
    end = time.time()
    return ShardsResult(
        manifest=f"{out.uri}/{MANIFEST}",
        digest=manifest.digest,
        samples=manifest.samples,
        validation=sums.splits["validation"],
        shards=sums.shards,
        written=written,
        reused=sums.shards - written,
        rejected=manifest.rejected,
        seconds=round(end - begin, 3),
        start_up_seconds=round(max(first_start - begin, 0.0), 3),
        samples_per_second=round(built / max(end - first_start, 1e-3), 3),
    )


def _require_tars(parts: PlanParts, inventory: Inventory, out: Storage) -> None:
    """Raises DeeDSRError if a tar that the manifest is going to name has been removed."""
    now = Inventory(Inventory.of(out).tars, inventory.records)
    gone = next((plan for plan in parts if not now.holds(plan)), None)
    if gone is not None:
        raise DeeDSRError(
            f"a shard of {out.uri} disappeared while others were made (number {gone.number}): something else removes "
            "files there; stop it and run the same command again"
        )


def index_of(dataset: Dataset) -> str:
    """Path of the dataset's `samples.parquet` whose content never changes."""
    return kept_copy(SAMPLES, dataset.manifest.files[SAMPLES])


def finished(job: Job) -> ShardsResult | None:
    """What `run_job` would return, if it would make no shard and the same manifest; makes and writes nothing.

    None where that cannot be known without reading all sources, as with a recipe that rejects duplicates.
    """
    if not job.made_of and job.recipe.duplicates == "reject":
        return None
    try:
        dataset = Dataset.open(job.out.uri)
    except DatasetNotCommitted:
        return None
    manifest = dataset.manifest
    theirs, ours = (made and replace(made, uri="") for made in (manifest.latents, job.latents))  # either may have moved
    if manifest.recipe_digest != job.recipe.digest or theirs != ours:
        return None
    inventory = Inventory.of(dataset.storage)
    # Ends with the first planned shard that is not there, or not the manifest's.
    held = (plan for plan in job.plans() if not inventory.holds(plan) or inventory.records[plan.id][1])
    names = (tar_name(plan, inventory.records[plan.id][0]) if inventory.holds(plan) else "" for plan in held)
    if any(name != entry for name, entry in zip_longest(names, (shard.name for shard in manifest.shards))):
        return None
    return ShardsResult(
        manifest=f"{dataset.uri}/{MANIFEST}",
        digest=manifest.digest,
        samples=manifest.samples,
        validation=dataset.index("validation").num_rows,
        shards=len(manifest.shards),
        reused=len(manifest.shards),
        rejected=manifest.rejected,
    )
