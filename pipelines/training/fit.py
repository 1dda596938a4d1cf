"""The driver of a training: configuration, MLflow run, Ray Train, result."""

import json
import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from deedsr.errors import DeeDSRError, UsageError
from pipelines import cluster, tracking
from pipelines.dataset import Dataset
from pipelines.placement import TrainingPlan, place_training
from pipelines.storage import Storage, open_storage
from pipelines.training import checkpoint, tracked
from pipelines.training.config import (
    MAY_CHANGE,
    AdapterOptions,
    LearnerOptions,
    TrainOptions,
    check,
    flatten,
    micro_batch,
    resolved,
    worker_range,
)
from pipelines.training.feasibility import require_best_metric, require_negatives
from pipelines.training.progress import progress_bar

logger = logging.getLogger(__name__)
Options = TypeVar("Options", LearnerOptions, AdapterOptions)
RECORD = "training.json"  # what this --out is: stage, configuration, inputs, MLflow run
START_SECONDS = 20  # Ray's 60 are mostly spent waiting for a node that is lost; nothing is lost by asking again


@dataclass
class TrainResult:
    """INTERFACE's result of `deedsr train`."""

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
    options = _located(options)
    dataset = _open("learner", options).require_pixels("the learner")
    require_best_metric(options, dataset)
    require_negatives(options, dataset)
    unit = options.contrast.batch_block
    inputs = {"dataset": dataset.digest} | _initial("learner", options)
    return _fit("learner", options, dataset, unit, inputs, {}, progress)


def train_adapter(options: AdapterOptions, *, progress: bool = True) -> TrainResult:
    """Stage 2; see `train_learner`."""
    from deedsr.sampling.base import check_base
    from pipelines.models import resolve_base, resolve_learner, training_run

    options = _located(options)
    dataset = _open("adapter", options)
    base, learner = resolve_base(options.base), resolve_learner(options.learner)
    check_base(base, options.diffusion.max_timestep)
    require_best_metric(options, dataset, base)
    _require_latents_of(dataset, options, base, learner)
    inputs = {"dataset": dataset.digest, "learner": _weights_digest(learner)} | _initial("adapter", options)
    parents = {"learner": training_run(options.learner)}
    return _fit("adapter", options, dataset, 1, inputs, parents, progress)


def _require_latents_of(dataset: Dataset, options: AdapterOptions, base: Path, learner: Path) -> None:
    """Refuse latents that other networks made than those that this training would use."""
    from pipelines.models import part_digest

    made_of = dataset.manifest.latents
    if made_of is None:
        return
    parts = {"base": (made_of.vae, base / "vae")} | ({"learner": (made_of.learner, learner)} if made_of.learner else {})
    differing = [
        f"--{name} {getattr(options, name)} ({'its VAE' if name == 'base' else 'it'} has digest {found:.12}, "
        f"theirs had {stored:.12})"
        for name, (stored, folder) in parts.items()
        if (found := part_digest(folder)) != stored
    ]
    if differing:
        raise UsageError(
            f"the latents in {dataset.uri} were not made with {' and not with '.join(differing)}: give what they were "
            f"made with, or make others by `deedsr latents`"
        )


def _initial(stage: str, options: LearnerOptions | AdapterOptions) -> dict[str, str]:
    """Digest of the weights that the training starts from, where it does not start from new ones."""
    if options.init is None:
        return {}
    from pipelines.training.initial import check_initial, initial_folder

    check_initial(options.init, options)
    return {"init": _weights_digest(initial_folder(options.init, stage))}


def _located(options: Options) -> Options:
    """Relative paths made absolute: workers, and whoever loads the model later, have other working directories.
    Names of MLflow's registry become what they mean now."""
    from pipelines.models import pinned

    places = {
        name: getattr(options, name) for name in ("data", "out", "learner", "base", "init") if hasattr(options, name)
    }
    places |= {name: pinned(places[name]) for name in ("learner", "init") if places.get(name)}
    local = {
        name: os.path.abspath(place)
        for name, place in places.items()
        if place not in ("", "tiny", None) and "://" not in place and (name in ("data", "out") or Path(place).exists())
    }
    return replace(options, **places | local)


def _open(stage: str, options: LearnerOptions | AdapterOptions) -> Dataset:
    for name in ("data", "out", *(("learner", "base") if isinstance(options, AdapterOptions) else ())):
        if not getattr(options, name):
            raise UsageError(f"--{name} is missing: see `deedsr train {stage} --help`")
    check(options)
    dataset = Dataset.open(options.data)
    if dataset.index("train").num_rows == 0:
        raise UsageError(f"{options.data} has no sample in its train split: the recipe's split leaves none")
    return dataset


def _fit(
    stage: str,
    options: LearnerOptions | AdapterOptions,
    dataset: Dataset,
    unit: int,
    inputs: dict[str, str],
    parents: dict[str, str | None],
    progress: bool,
) -> TrainResult:
    if given := worker_range(options.train.num_workers):
        for workers in range(given[0], given[1] + 1):  # an elastic run may come to have any number between
            micro_batch(options.train, workers, unit)
    out = open_storage(options.out)
    record = _read_record(out)
    if record:
        _refuse_differences(record, stage, options, inputs)
        done = checkpoint.committed(out)
        if done and done[-1].step >= options.train.max_steps and record.get("exported") == done[-1].step:
            if record.get("published") != done[-1].step:
                run = tracking.open_run(tracking.tracking_uri(), record["run_id"], system_metrics=False)
                _conclude(run, options, out, record, done[-1])
            return _result(record["run_id"], out, done[-1])

    uri = tracking.tracking_uri()
    # Its imports and a new store take as long as the start of Ray's processes. A continuation does without the store.
    with nullcontext() if record else _beside(lambda: tracking.connect(uri)):
        cluster.connect()
    tracking.require_shared_store(uri, cluster.nodes())
    plan = _placed(stage, options.train, unit)
    if record is None:  # a run that is continued has these tags
        made = {"shards": dataset.order_digest} | ({"latents": dataset.digest} if dataset.manifest.latents else {})
        for kind, digest in made.items():
            parents[kind] = tracking.find_run(None, {"deedsr.kind": kind, "deedsr.dataset.digest": digest})
    with tracking.start_run(
        options.experiment,
        name=Path(options.out.rstrip("/")).name,
        config=resolved(options),
        dataset=dataset,
        parents=parents,
        run_id=record["run_id"] if record else None,
        tags={"deedsr.kind": stage, "deedsr.out": tracking.masked_uri(options.out)},
        tracking_uri=uri,
        system_metrics=False,
        patient=True,
    ) as run:
        record = {"stage": stage, "config": resolved(options), "inputs": inputs, "run_id": run.id}
        out.write(RECORD, json.dumps(record, indent=1).encode())
        _run_ray_train(stage, options, run.id, uri, plan, progress)
        last = checkpoint.committed(out)[-1]
        record |= {"exported": last.step}
        out.write(RECORD, json.dumps(record, indent=1).encode())
        _conclude(run, options, out, record, last)
    return _result(run.id, out, last)


def _placed(stage: str, train: TrainOptions, unit: int) -> TrainingPlan:
    """Where the training runs, once the cluster has room for it."""
    most: int | None = None
    while True:
        plan = place_training(cluster.offer(), train, unit, most)
        logger.info("train %s: %s", stage, plan)
        try:
            cluster.wait_for(plan, "--train.gpus_per_worker 0 trains on CPUs")
        except cluster.CannotHold:
            if train.num_workers != "auto" or plan.fewest == 1:
                raise
            most = plan.fewest - 1
        else:
            return plan


@contextmanager
def _beside(work: Callable[[], object]) -> Iterator[None]:
    """Does `work` on a thread meanwhile. It is only done early: whoever needs it does it again and sees its errors."""

    def quietly() -> None:
        with suppress(Exception):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    yield
    thread.join()


def _conclude(
    run: tracking.Run,
    options: LearnerOptions | AdapterOptions,
    out: Storage,
    record: dict[str, Any],
    last: checkpoint.Checkpoint,
) -> None:
    """Tell the MLflow store what came out, once: the last checkpoint, and the model as a version of the registry."""
    from pipelines.tracking.provenance import COMMIT_TAG, DIGEST_TAG, PARENT_TAG
    from pipelines.tracking.registry import register

    def publish() -> None:
        run.set_tags({"deedsr.checkpoint": tracking.masked_uri(f"{out.uri}/{last.folder}")})
        if not options.register_as:
            return
        known = run.client.get_run(run.id).data.tags
        lineage = {k: v for k, v in known.items() if k in (COMMIT_TAG, DIGEST_TAG) or k.startswith(PARENT_TAG)}
        lineage |= {"deedsr.kind": record["stage"], "deedsr.step": str(last.step)}
        if isinstance(options, AdapterOptions):
            lineage["deedsr.base"] = tracking.masked_uri(options.base)
        register(run, options.register_as, out, lineage)

    if tracked.conclude(run, out, publish):
        out.write(RECORD, json.dumps(record | {"published": last.step}, indent=1).encode())


def _run_ray_train(
    stage: str,
    options: LearnerOptions | AdapterOptions,
    run_id: str,
    tracking_uri: str,
    plan: TrainingPlan,
    progress: bool,
) -> None:
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS))
    local = cluster.is_local()
    if local:  # no node of it is drained, so nobody need watch for that
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.training.backend import ListeningTorchConfig, OneMachineTrainer
    from pipelines.training.worker import train_worker

    placed = replace(options, train=replace(options.train, loader_threads=plan.loader_threads))
    # Ray Train keeps its own records per attempt; ours are the checkpoints in --out, so these are dropped again.
    done = checkpoint.committed(open_storage(options.out))
    with (
        cluster.scratch(options.out, f"_ray-{uuid.uuid4().hex[:8]}") as (path, filesystem),
        progress_bar(stage, options.train.max_steps, done[-1].step if done else 0, progress) as bar,
    ):
        trainer = (OneMachineTrainer if local else TorchTrainer)(
            train_worker,
            train_loop_config={
                "stage": stage,
                "options": asdict(placed),
                "run_id": run_id,
                "tracking_uri": tracking_uri,
                "device": plan.device,
                "threads": plan.threads,
                "progress": bar,
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
                failure_config=FailureConfig(max_failures=options.train.max_failures),
            ),
        )
        try:
            with ended_by_signals(bar) as interrupted:
                # Not on the main thread: there Ray would answer Ctrl-C itself, without a checkpoint.
                said = ThreadPoolExecutor(1).submit(trainer.fit).result().return_value
        except Exception as error:
            raise _explained(stage, error) from error
        if interrupted.is_set():
            raise KeyboardInterrupt(said)
        if said:
            raise DeeDSRError(said)


@contextmanager
def ended_by_signals(progress: Any) -> Iterator[threading.Event]:
    """Within it, SIGTERM and Ctrl-C have the workers checkpoint and end; a second one interrupts at once."""
    interrupted = threading.Event()

    def handle(number: int, frame: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        logger.info("%s: the training checkpoints and ends; once more ends it at once", signal.Signals(number).name)
        progress.end.remote()

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explained(stage: str, error: Exception) -> DeeDSRError:
    """The first cause that a user can act on, else the last line of what the worker said."""
    seen: BaseException | None = error
    while seen is not None:
        at_start = getattr(seen, "controller_failure", None)
        for inner in (seen, at_start, *getattr(seen, "worker_failures", {}).values()):
            cause = getattr(inner, "cause", None) or inner
            if isinstance(cause, DeeDSRError):
                return cause
        seen = seen.__cause__ or seen.__context__
    last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return DeeDSRError(
        f"training the {stage} failed: {last}. What was checkpointed stays; the same command continues from there"
    )


def _refuse_differences(
    record: dict[str, Any], stage: str, options: LearnerOptions | AdapterOptions, inputs: dict[str, str]
) -> None:
    where = f"{options.out} holds a training of"
    if record["stage"] != stage:
        raise UsageError(f"{where} the {record['stage']}, not of the {stage}: choose another --out")
    before, now = flatten(record["config"]), flatten(json.loads(json.dumps(resolved(options))))
    # Data, learner and initial weights are compared by content: they may have moved.
    same_by_content = MAY_CHANGE | {"data", "learner", "init"}
    # A training from before there was an option has its default.
    defaults = flatten(json.loads(json.dumps(resolved(type(options)()))))
    before = {key: value for key, value in defaults.items() if value != {}} | before
    differing = sorted(
        k for k in before.keys() | now.keys() if k not in same_by_content and before.get(k) != now.get(k)
    )
    lines = [f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in differing]
    had = record["inputs"]
    lines += [f"{k} was {had.get(k)}, is {inputs.get(k)}" for k in sorted(had | inputs) if had.get(k) != inputs.get(k)]
    if lines:
        raise UsageError(f"{where} another configuration: {'; '.join(lines)}. Choose another --out, or the old values")


def _read_record(out: Storage) -> dict[str, Any] | None:
    try:
        return json.loads(out.read(RECORD))
    except FileNotFoundError:
        return None


def _weights_digest(folder: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(folder.glob("[!.]*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _result(run_id: str, out: Storage, last: checkpoint.Checkpoint) -> TrainResult:
    return TrainResult(run_id, f"{out.uri}/{last.folder}", last.step, last.loss, last.samples_seen)
