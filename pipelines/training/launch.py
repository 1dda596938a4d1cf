"""The driver of a training: configuration, MLflow run, Ray Train, result."""

import logging
import os
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from deedsr.errors import UsageError
from deedsr.metrics.fidelity import PSNR
from pipelines import cluster, tracking
from pipelines.claims import held
from pipelines.data.dataset import Dataset
from pipelines.data.index import require_hr
from pipelines.storage import Storage, open_storage
from pipelines.training import checkpoint
from pipelines.training.checks import (
    check_adapter_data,
    check_learner_data,
    require_best_metric,
    require_latents_of,
    warn_of_idle,
)
from pipelines.training.config import AdapterOptions, LearnerOptions, TrainOptions, check
from pipelines.training.identity import Claim, TrainingRecord, continued, refuse_of_others, weights_digest
from pipelines.training.metrics import FOLDER, recorded
from pipelines.training.placement import TrainingPlan, arithmetic, decided, place_training
from pipelines.training.schedules import with_schedule
from pipelines.training.supervision import WITHOUT_GPUS, bar, progress_actor, supervised

logger = logging.getLogger(__name__)
Options = TypeVar("Options", LearnerOptions, AdapterOptions)
START_SECONDS = 20  # Ray's 60 are mostly spent waiting for a node that is lost; nothing is lost by asking again


@dataclass
class TrainResult:
    """Result of `deedsr train`."""

    run_id: str
    checkpoint: str
    step: int
    loss: float
    samples_seen: int


def train_learner(options: LearnerOptions, *, progress: bool = True) -> TrainResult:
    """Stage 1. The same call again continues from the last checkpoint, and does nothing when all is done.

    Raises UsageError for a configuration that cannot work or differs from the one `options.out` began with,
    DeeDSRError when the training failed.
    """
    from pipelines.models import Learner

    options, dataset = _opened(options)
    dataset.require_pixels("the learner")
    options, models = _found(options, init=Learner)
    check_learner_data(options, dataset)
    require_best_metric(options, dataset)
    return Launch(options, dataset, models, progress).fit()


def train_adapter(options: AdapterOptions, *, progress: bool = True) -> TrainResult:
    """Stage 2; see `train_learner`."""
    from deedsr.hub.base import check_base
    from pipelines.models import Adapter, Base, Learner

    options, dataset = _opened(options)
    options, models = _found(options, learner=Learner, base=Base, init=Adapter)
    base, learner = models["base"], models["learner"]
    check_base(base.path, options.diffusion.max_timestep)
    check_adapter_data(options, dataset, base.path, learner.path)
    require_best_metric(options, dataset, base.path)
    require_latents_of(dataset, options, base.path, learner.path)
    return Launch(options, dataset, models, progress).fit()


def _located(options: Options) -> Options:
    """Relative paths as workers can use them."""
    places = {"data": options.data, "out": options.out}
    located: Any = {name: open_storage(place).uri for name, place in places.items() if place and "://" not in place}
    return replace(options, **located)


def _opened(options: Options) -> tuple[Options, Dataset]:
    options = _located(options)
    for name in ("data", "out", "learner", "base"):
        if not getattr(options, name, "not of this stage"):
            raise UsageError(f"--{name} is missing: see `deedsr train {options.stage} --help`")
    check(options)
    dataset = Dataset.open(options.data)
    if dataset.index("train").num_rows == 0:
        raise UsageError(f"{options.data} has no sample in its train split: the recipe's split leaves none")
    require_hr(dataset)
    warn_of_idle(options, dataset)
    return options, dataset


def _found(options: Options, **kinds: Any) -> tuple[Options, dict[str, Any]]:
    """The models that the options name, by role, and the options with the names of one revision, for workers,
    continuations and whoever loads the model later."""
    models = {role: kind.find(name) for role, kind in kinds.items() if (name := getattr(options, role))}
    names: Any = {role: model.name for role, model in models.items()}
    return replace(options, **names), models


@dataclass
class Launch:
    """A training that is asked for."""

    options: LearnerOptions | AdapterOptions
    dataset: Dataset
    models: dict[str, Any]  # that it starts from, by role
    progress: bool

    def fit(self) -> TrainResult:
        if "init" in self.models:
            from pipelines.training.loop import make_stage

            make_stage(self.options, self.dataset).check_init()
        digests = {role: weights_digest(model.path) for role, model in self.models.items() if role != "base"}
        self.inputs = {"dataset": self.dataset.digest} | digests
        if "base" in self.models:
            self.inputs["base"] = self.models["base"].digest
        out = open_storage(self.options.out)
        began = TrainingRecord.read(out)
        self.options = with_schedule(self.options, began.config if began else None)
        record, done = continued(out, self.options, self.inputs)
        if not (record and done and record.published == done.step):
            with held(Claim(out)) as claim:
                record, done = continued(out, self.options, self.inputs)  # another command may have held it before
                if record is None or done is None:
                    record, done = self._train(claim, record)
                elif record.published != done.step:
                    run = tracking.open_run(tracking.tracking_uri(), record.run_id, system_metrics=False)
                    self._conclude(run, record, done)
        return TrainResult(record.run_id, f"{out.uri}/{done.folder}", done.step, done.loss, done.samples_seen)

    def _train(self, claim: Claim, record: TrainingRecord | None) -> tuple[TrainingRecord, checkpoint.Checkpoint]:
        out, uri = claim.out, tracking.tracking_uri()

        def warm_up() -> None:  # MLflow's imports and a new store take as long as the start of Ray's processes
            with suppress(Exception):  # `start_run` does it again, and raises its errors
                tracking.connect(uri)

        beside = threading.Thread(target=warm_up, daemon=True)
        if record is None:  # a continuation needs no store
            beside.start()
        cluster.connect()
        if record is None:
            beside.join()
        tracking.require_shared_store(uri, cluster.nodes())
        plan, train = _placed(self.options, record.config["train"] if record else None)
        self.options = replace(self.options, train=train)
        parents = {"learner": self.models["learner"].run_id} if "learner" in self.models else {}
        if record is None:  # a run that is continued has these tags
            made = {"shards": self.dataset.order_digest}
            if self.dataset.manifest.latents:
                made["latents"] = self.dataset.digest
            for kind, digest in made.items():
                parents[kind] = tracking.find_run(None, {"deedsr.kind": kind, "deedsr.dataset.digest": digest})
        config = asdict(self.options)
        if self.options.stage == "adapter":
            config["definitions"] = {f"validation/{name}": PSNR().statement() for name in ("psnr_y", "psnr_y_bicubic")}
        with tracking.start_run(
            self.options.experiment,
            name=Path(self.options.out.rstrip("/")).name,
            config=config,
            dataset=self.dataset,
            parents=parents,
            run_id=record.run_id if record else None,
            tags={"deedsr.kind": self.options.stage, "deedsr.plan": str(plan)},
            out=self.options.out,
            tracking_uri=uri,
            system_metrics=False,
            fault_tolerant=True,
            permit=claim.holds,
        ) as run:
            version = record.version if record else None
            record = TrainingRecord(self.options.stage, asdict(self.options), self.inputs, run.id, version=version)
            record.write(out)
            claim.run_id = run.id
            self._run_ray_train(claim, uri, plan)
            claim.check()
            last = checkpoint.committed(out)[-1]
            refuse_of_others(out, last, run.id)
            record.exported = last.step
            record.write(out)
            self._conclude(run, record, last)
        return record, last

    def _conclude(self, run: tracking.Run, record: TrainingRecord, last: checkpoint.Checkpoint) -> None:
        """Log the result to the MLflow store, once: the last checkpoint, and the model as a version of the registry."""
        from pipelines.tracking.provenance import COMMIT_TAG, DIGEST_TAG, PARENT_TAG
        from pipelines.tracking.registry import register

        out = open_storage(self.options.out)

        def publish() -> None:
            run.set_tags({"deedsr.checkpoint": tracking.masked_uri(f"{out.uri}/{last.folder}")})
            if not self.options.register_as:
                return
            known = run.client.get_run(run.id).data.tags
            lineage = {k: v for k, v in known.items() if k in (COMMIT_TAG, DIGEST_TAG) or k.startswith(PARENT_TAG)}
            lineage |= {"deedsr.kind": record.stage, "deedsr.step": str(last.step)}
            if isinstance(self.options, AdapterOptions):
                lineage["deedsr.base"] = tracking.masked_uri(self.options.base)
            register(run, self.options.register_as, out, lineage)

        if finish_run(run, out, publish):
            record.published = last.step
            record.write(out)

    def _run_ray_train(self, claim: Claim, uri: str, plan: TrainingPlan) -> None:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS))
        if cluster.is_local():  # no node of it is drained, so nobody need watch for that
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from pipelines.training.ray_train import GroupWatch, ListeningTorchConfig, RestartingTrainer, train_worker

        stage, train = self.options.stage, self.options.train
        placed = replace(self.options, train=replace(train, loader_threads=plan.loader_threads))
        # Ray Train keeps its own records per attempt; ours are the checkpoints in --out, so these are dropped again.
        done = checkpoint.committed(claim.out)
        with (
            cluster.scratch(self.options.out, f"_ray-{uuid.uuid4().hex[:8]}") as (path, filesystem),
            progress_actor() as progress,
            bar(stage, train.max_steps, done[-1].step if done else 0, self.progress) as shown,
        ):
            trainer = RestartingTrainer(
                train_worker,
                train_loop_config={
                    "options": placed,
                    "claim": claim,
                    "tracking_uri": uri,
                    "device": plan.device,
                    "threads": plan.threads,
                    "progress": progress,
                },
                torch_config=ListeningTorchConfig(backend=plan.backend),
                scaling_config=ScalingConfig(
                    num_workers=plan.workers[0] if plan.workers[0] == plan.workers[1] else plan.workers,
                    use_gpu=bool(plan.gpus),
                    resources_per_worker=plan.bundle,
                ),
                run_config=RunConfig(
                    name=f"deedsr-{stage}",
                    storage_path=path,
                    storage_filesystem=filesystem,
                    failure_config=FailureConfig(max_failures=train.max_failures),
                    callbacks=[GroupWatch(progress)],
                ),
            )
            supervised(stage, trainer, progress, shown, plan, claim)


def _placed(
    options: LearnerOptions | AdapterOptions, began: dict[str, Any] | None
) -> tuple[TrainingPlan, TrainOptions]:
    """Where the training runs, once the cluster has room for it, and its options as they are recorded."""
    train, unit, most = options.train, options.unit, None
    gpus = bool(place_training(cluster.offer(), train, unit).gpus)
    by_card = gpus and train.micro_batch_size == "auto" and began is None
    if not by_card:
        train = decided(train, gpus, began, unit=unit)
    while True:
        plan = place_training(cluster.offer(), train, unit, most)
        logger.info("train %s: %s%s", options.stage, plan, f"; {arithmetic(train)}" if gpus and not by_card else "")
        try:
            cluster.wait_for(plan, WITHOUT_GPUS)
        except cluster.CannotHold:
            if train.num_workers != "auto" or plan.fewest == 1:
                raise
            most = plan.fewest - 1
            continue
        if not by_card:
            return plan, train
        memory = cluster.gpu_memory(plan)
        train, by_card = decided(train, gpus, memory=memory, workers=plan.workers[1], unit=unit), False


def finish_run(run: tracking.Run, out: Storage, publish: Callable[[], object]) -> bool:
    """Send what the MLflow store lacks of the metrics, then `publish` (tags, model), and finish the run.

    False, with a warning, when the store did not take it in time.
    """
    run.replay(partial(recorded, out))
    run.later(publish)
    if run.finish():
        return True
    logger.warning(
        "the model in %s is finished, but the MLflow store did not come back: its metrics are in %s/%s. "
        "The same command again sends it",
        out.uri,
        out.uri,
        FOLDER,
    )
    return False
