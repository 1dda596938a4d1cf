"""What every training worker runs."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deedsr.errors import DeeDSRError
from pipelines.claims import Superseded
from pipelines.data.dataset import Dataset
from pipelines.data.loader import Batch, follow, micro_batches
from pipelines.data.order import SampleOrder
from pipelines.data.shard_cache import ShardCache
from pipelines.scratch import scratch_folder
from pipelines.storage import Storage, open_storage, publish, waiting
from pipelines.storage.errors import FAILURES
from pipelines.training import checkpoint, tracked
from pipelines.training.checkpoint import read_agreed
from pipelines.training.config import (
    AdapterOptions,
    LearnerOptions,
    TrainOptions,
    from_resolved,
    micro_batch,
)
from pipelines.training.engine import Engine, on_cpu
from pipelines.training.health import (
    MOST_IN_A_ROW,
    BlockedReads,
    Ended,
    LossWindow,
    Moved,
    Records,
    Stop,
    Untrainable,
    Unwritable,
    Watchdog,
)
from pipelines.training.identity import Claim
from pipelines.training.metrics import Meter
from pipelines.training.schedules import learning_rate
from pipelines.training.stage import Stage, under
from pipelines.training.validation import Validation

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0  # between two looks at a checkpoint that is being written
VALIDATION_SECONDS = 1800.0  # that a validation may take before a worker counts as hung


def train_worker(config: dict[str, Any]) -> str | None:
    """Ray Train's loop of one worker. `config`: `stage`, `options`, `claim`, `tracking_uri`, `device`, `threads`,
    `progress`.

    Returns what is to be told the user instead where starting the workers again would be of no use.
    """
    import ray.train.torch

    from pipelines.training.ray_train import Asked

    torch.set_num_threads(config["threads"])
    options: LearnerOptions | AdapterOptions
    if config["stage"] == "learner":
        from pipelines.training.learner_stage import LearnerStage

        options = from_resolved(LearnerOptions, config["options"])
    else:
        options = from_resolved(AdapterOptions, config["options"])
    dataset = Dataset.open(options.data)
    stage: Stage
    if isinstance(options, LearnerOptions):
        stage = LearnerStage(options)
    else:
        from pipelines.training.adapter_stage import AdapterStage

        stage = AdapterStage(options, dataset.scale, dataset.manifest.latents)
    stage.fetch()  # before the watchdog counts, and once for all workers of a node
    rank = ray.train.get_context().get_world_rank()
    asked = Asked(config["progress"], rank)
    claim: Claim = config["claim"]
    try:
        claim.next_attempt() if rank == 0 else claim.check()
    except Superseded as end:  # by another command: every worker finds the same
        return str(end)
    run = None
    if rank == 0:
        from pipelines import tracking

        run = tracking.open_run(config["tracking_uri"], claim.run_id, permit=claim.holds)
        run.take_up(tracked.unsent(open_storage(options.out)))
    try:
        device = ray.train.torch.get_device() if config["device"] == "cuda" else torch.device("cpu")
        progress = config["progress"]
        train(stage, options, dataset, device, run, progress.tell.remote, asked, claim, progress.say.remote)
    except (Ended, Untrainable, Unwritable) as end:  # every worker has the same
        return str(end)
    finally:
        if run is not None and not run.close():
            try:
                tracked.keep(open_storage(options.out), run.unsent())
            except DeeDSRError as error:  # the last checkpoint has them but for those after it
                logger.warning("metrics that MLflow did not take could not be kept: %s", error)
    return None


def train(
    stage: Stage,
    options: LearnerOptions | AdapterOptions,
    dataset: Dataset,
    device: torch.device,
    run: Any | None,
    tell: Callable[[int, dict[str, float]], Any] = lambda step, values: None,
    asked: Callable[[], Stop] = lambda: Stop.NO,
    claim: Claim | None = None,
    say: Callable[[str], Any] = logger.warning,
) -> None:
    """Train `stage` from its last checkpoint to `train.max_steps`. Needs a process group; every worker calls it.

    Rank 0 logs to `run` and tells `tell` each logged step and its numbers. Once a worker is `asked` to stop, all of
    them checkpoint after the same step and raise Moved or Ended. Raises Untrainable where the loss says so, Unwritable
    where storage takes no checkpoint; `say` gets a line every half minute while it is waited for. `claim`: of these
    workers on `options.out`; rank 0 raises Superseded before it would write there when it is another's.
    """
    plan = options.train
    out = open_storage(options.out)
    check = claim.check if claim else lambda: None
    run_id, attempt = (claim.run_id, claim.attempt) if claim else ("", 0)
    index = dataset.index("train")
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    keep = checkpoint.Keep(plan.keep_checkpoints, plan.best_metric, plan.best_mode)
    with (
        Watchdog(plan.hang_seconds) as watchdog,
        BlockedReads(watchdog, _store(), rank, asked, say) as blocked,
        checkpoint.Writer(out, keep, check, say) as writer,
        Records(out, check) as records,
        ShardCache(int(plan.cache_gb * 1e9)) as shards,
    ):
        # 1. networks, and what an earlier part of this run left
        module = stage.build(device, torch.bfloat16 if plan.precision == "bf16" else torch.float32)
        with blocked.reading():
            found = read_agreed(out, device)
        first_step, loss_value = 0, float("nan")
        latest: dict[str, float] = {}  # what was logged last, by metric
        losses = LossWindow(plan.spike_sigma)
        ema: dict[str, Tensor] = {}
        if found:
            first_step, loss_value, latest = found[0].step, found[0].loss, found[0].metrics
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(found[1]["trained"][name])
            state = found[1]["state"]
            stage.load_state(under(state, "stage."))
            losses.load_state(under(state, "losses."))
            ema = {name: average.to(device) for name, average in under(state, "ema.").items()}

        # 2. engine and data
        micro, accumulation = micro_batch(plan, world_size, stage.unit)
        optimizer_state = found[1]["optimizer"] if found else None
        engine = Engine(module, plan, micro=micro, accumulation=accumulation, optimizer_state=optimizer_state)
        meter = Meter(plan.global_batch_size, device, latest.get("loss_smoothed"))
        del found
        order = SampleOrder(index, dataset.order_digest, plan.seed, together=stage.together)
        dataset = replace(dataset, through=shards.open)
        validation = Validation(stage, dataset, engine, micro)
        batches = micro_batches(
            order,
            lambda epoch, row: stage.sample(dataset, index, row, epoch),
            first_step=first_step,
            last_step=plan.max_steps,
            global_batch=plan.global_batch_size,
            micro=micro,
            world_size=world_size,
            rank=rank,
            threads=plan.loader_threads or 2,
            at=follow(shards, order, index),
        )

        # 3. optimizer steps
        for step in range(first_step + 1, plan.max_steps + 1):
            lr = learning_rate(plan, step - 1)
            numbers: dict[str, Tensor] = {}
            read, waited = [], 0.0
            for part in range(accumulation):
                before = time.perf_counter()
                with blocked.reading():
                    read.append(next(batches))
                batch = {name: t.to(device) for name, t in read[-1].items()}
                waited += time.perf_counter() - before
                loss, more = stage.loss(engine, batch)
                engine.backward(loss)
                for name, value in {"loss": loss, **more}.items():
                    numbers[name] = numbers.get(name, 0) + value.detach().double()
                if part < accumulation - 1:
                    engine.accumulate()

            values, stop = _agreed(engine, numbers, asked(), writer)
            meter.step(values, waited)
            objection = losses.objection(values["loss"])
            if not engine.step(lr, take=objection is None):
                objection = objection or "the gradient is not finite"
            if objection is None:
                stage.end_step(engine)
                if plan.ema_decay:
                    _average(ema, engine, min(plan.ema_decay, step / (step + 9)))
                loss_value = values["loss"]
                losses.take(loss_value)
            else:
                stage.drop_step()
                losses.skip()
                keys = [
                    {"epoch": epoch, "key": index["key"][row].as_py()}
                    for epoch, row in order.slice((step - 1) * plan.global_batch_size, step * plan.global_batch_size)
                ]
                values |= {"grad_norm": engine.grad_norm()}
                incident = {"step": step, "reason": objection, "lr": lr, "world_size": world_size, "samples": keys}
                _skipped(records, watchdog, plan, losses, incident | values, read, rank)

            if step % plan.log_every == 0 or step == plan.max_steps:
                told = meter.read() | {"lr": lr, "grad_norm": engine.grad_norm(), "skipped_steps": losses.skipped}
                latest = latest | told
                if run is not None:
                    run.log_metrics(told, step)
                if rank == 0:
                    tell(step, told)
            if validation.due(step):
                watchdog.patience(VALIDATION_SECONDS)
                latest = latest | validation.measure(step, ema, run)
            watchdog.beat()

            if stop or step % plan.checkpoint_every == 0 or step == plan.max_steps:
                watchdog.patience(waiting.limit())
                stalled = time.perf_counter()
                _until_written(engine, writer, asked)  # here the others have patience to wait for rank 0, in a step not
                tensors = _gathered(stage, engine, ema, losses)
                metrics = {name: value for name, value in latest.items() if math.isfinite(value)}
                metrics["loss"] = losses.mean
                saved = checkpoint.Checkpoint(
                    step, step * plan.global_batch_size, loss_value, metrics=metrics, run_id=run_id, attempt=attempt
                )
                if run is not None:
                    run.log_metrics({"checkpoint_stall_seconds": time.perf_counter() - stalled}, step)
                    saved.unsent = run.unsent()  # with these, a checkpoint never runs ahead of the curves
                if rank == 0:
                    writer.start(saved, tensors)
                if stop:
                    _until_written(engine, writer, asked)
                    records.wait()
                    raise Moved(step) if stop is Stop.MOVE else Ended(step)
                watchdog.beat()

        # 4. the trained model
        watchdog.patience(waiting.limit())
        _until_written(engine, writer, asked)
        lost: DeeDSRError | None = None
        if rank == 0:
            found = checkpoint.read_latest(out)
            if found is None or found[0].step < plan.max_steps:
                raise DeeDSRError(
                    f"the checkpoint of step {plan.max_steps} in {out.uri} was damaged after it was written"
                )
            last = found
            try:
                with waiting.within(say=say):
                    waiting.patiently(lambda: _export(out, stage, *last, dataset, check))
            except FAILURES as error:
                lost = error
        if engine.sum(torch.tensor(float(lost is not None), device=device)):
            raise Unwritable(f"the model could not be written: {lost}")


def _store() -> Any:
    """What the workers of the process group share; torch has no other name for it."""
    return torch.distributed.distributed_c10d._get_default_store()


def _until_written(engine: Engine, writer: checkpoint.Writer, asked: Callable[[], Stop]) -> None:
    """Waits until the last checkpoint is committed; every worker calls it, and all of them raise alike.

    A checkpoint that storage does not take is given up when the run is to end.
    """
    while True:
        busy = writer.busy(POLL_SECONDS)
        given_up = busy and asked() is Stop.END and writer.give_up()
        failure = writer.failure
        if isinstance(failure, Superseded):
            raise failure
        state = engine.sum(torch.tensor([busy, given_up, failure is not None], dtype=torch.float32).to(engine.device))
        busy, given_up, failed = state.tolist()
        if failed or given_up:
            raise Unwritable(str(failure or "ended before storage took the checkpoint"))
        if not busy:
            writer.wait()
            return


def _agreed(
    engine: Engine, numbers: dict[str, Tensor], asked: Stop, writer: checkpoint.Writer
) -> tuple[dict[str, float], Stop]:
    """Means over the workers, and what the workers do after this step; the same on every worker.

    All of them raise Unwritable where `writer` has given up.
    """
    names = sorted(numbers)
    sums = torch.stack([numbers[name] for name in names])  # float64: in any order the same
    failure = writer.failure
    if isinstance(failure, Superseded):
        raise failure
    asks = sums.new_tensor([asked is Stop.MOVE, asked is Stop.END, failure is not None])
    *values, move, end, failed = engine.sum(torch.cat([sums, asks])).tolist()
    if failed:
        raise Unwritable(str(failure or "a checkpoint could not be written"))
    means = {name: value / engine.micro_batches for name, value in zip(names, values, strict=True)}
    return means, Stop.END if end else Stop.MOVE if move else Stop.NO


def _skipped(
    records: Records,
    watchdog: Watchdog,
    plan: TrainOptions,
    losses: LossWindow,
    values: dict[str, Any],
    read: list[Batch],
    rank: int,
) -> None:
    """Record a step that was not taken; raises Untrainable where the run should not go on."""
    batch = {name: torch.cat([part[name] for part in read]) for name in read[0]}
    place = records.add(values["step"], values, batch, rank)
    logger.warning("step %d is not taken: %s (%s)", values["step"], values["reason"], place)
    if plan.on_spike == "skip" and losses.in_a_row < MOST_IN_A_ROW:
        return
    watchdog.patience(waiting.limit())
    records.wait()
    why = "train.on_spike is stop" if plan.on_spike == "stop" else f"so were the {MOST_IN_A_ROW - 1} steps before"
    raise Untrainable(
        f"step {values['step']} was not taken, because {values['reason']}, and {why}: its samples are in {place}. "
        "The same command goes on from the last checkpoint; to pass over such batches, --train.on_spike skip"
    )


def _average(ema: dict[str, Tensor], engine: Engine, decay: float) -> None:
    with engine.full_parameters() as parameters, torch.no_grad():
        for name, value in parameters:
            if name in ema:
                ema[name].lerp_(value.float(), 1 - decay)
            else:
                ema[name] = value.float().clone()


def _gathered(stage: Stage, engine: Engine, ema: dict[str, Tensor], losses: LossWindow) -> checkpoint.Tensors:
    """Copies of all that a continuation needs, on the CPU of rank 0; a collective."""
    trained = {}
    with engine.full_parameters() as parameters:
        for name, value in parameters:
            if engine.rank == 0:
                trained[name] = on_cpu(value.float())
    optimizer = engine.optimizer_state()
    if engine.rank:
        return {}
    held = {"stage.": stage.state(), "ema.": ema, "losses.": losses.state()}
    state = {prefix + name: on_cpu(t) for prefix, tensors in held.items() for name, t in tensors.items()}
    return {"trained": trained, "optimizer": optimizer, "state": state}


def _export(
    out: Storage,
    stage: Stage,
    last: checkpoint.Checkpoint,
    tensors: dict[str, dict[str, Tensor]],
    dataset: Dataset,
    check: Callable[[], None],
) -> None:
    """The averaged weights where there are any, else the last ones. `check`: raises where nothing may be written."""
    averaged, rest = under(tensors["state"], "ema."), under(tensors["state"], "stage.")
    history = {
        "dataset": {
            "digest": dataset.digest,
            "recipe": dataset.recipe.name,
            "samples": dataset.index("train").num_rows,
        },
        "step": last.step,
        "samples_seen": last.samples_seen,
        "metrics": {name: value for name, value in last.metrics.items() if name.startswith("validation/")},
    }
    with scratch_folder() as folder:
        stage.export(folder, averaged or tensors["trained"], rest, history)
        check()
        publish(folder, out.uri)
