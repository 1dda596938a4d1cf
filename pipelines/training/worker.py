"""What every training worker runs."""

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.dataset import Dataset
from pipelines.storage import Storage, open_storage, publish
from pipelines.training import checkpoint, tracked
from pipelines.training.config import AdapterOptions, LearnerOptions, from_resolved, learning_rate, micro_batch
from pipelines.training.engine import Engine
from pipelines.training.loader import micro_batches
from pipelines.training.metrics import Meter
from pipelines.training.order import SampleOrder
from pipelines.training.stage import Stage
from pipelines.training.validation import Validation

logger = logging.getLogger(__name__)


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's loop of one worker. `config`: `stage`, `options`, `run_id`, `tracking_uri`, `threads`, `progress`."""
    import ray.train.torch

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

        stage = AdapterStage(options, dataset.scale)
    run = None
    if ray.train.get_context().get_world_rank() == 0:
        from pipelines import tracking

        run = tracking.open_run(config["tracking_uri"], config["run_id"])
        run.take_up(tracked.unsent(open_storage(options.out)))
    try:
        train(stage, options, dataset, ray.train.torch.get_device(), run, config["progress"].tell.remote)
    finally:
        if run is not None and not run.close():
            tracked.keep(open_storage(options.out), run.unsent())


def train(
    stage: Stage,
    options: LearnerOptions | AdapterOptions,
    dataset: Dataset,
    device: torch.device,
    run: Any | None,
    tell: Callable[[int, dict[str, float]], Any] = lambda step, values: None,
) -> None:
    """Train `stage` from its last checkpoint to `train.max_steps`. Needs a process group; every worker calls it.

    Rank 0 logs to `run` and tells `tell` each logged step and its numbers.
    """
    plan = options.train
    out = open_storage(options.out)
    index = dataset.index("train")

    # 1. networks, and what an earlier part of this run left
    module = stage.build(device, torch.bfloat16 if plan.precision == "bf16" else torch.float32)
    found = checkpoint.read_latest(out)
    first_step, loss_value = 0, float("nan")
    ema: dict[str, Tensor] = {}
    if found:
        first_step, loss_value = found[0].step, found[0].loss
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(found[1]["trained"][name])
        state = found[1]["state"]
        stage.load_state({k.removeprefix("stage."): v for k, v in state.items() if k.startswith("stage.")})
        ema = {k.removeprefix("ema."): v.to(device) for k, v in state.items() if k.startswith("ema.")}

    # 2. engine and data
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    micro, accumulation = micro_batch(plan, world_size, stage.unit)
    optimizer_state = found[1]["optimizer"] if found else None
    engine = Engine(module, plan, micro=micro, accumulation=accumulation, optimizer_state=optimizer_state)
    meter = Meter(plan.global_batch_size, device, found[0].metrics.get("loss_smoothed") if found else None)
    validation = Validation(stage, dataset, engine, micro)
    del found
    batches = micro_batches(
        SampleOrder(index, dataset.digest, plan.seed, together=stage.together),
        lambda epoch, row: stage.sample(dataset, index, row, epoch),
        first_step=first_step,
        last_step=plan.max_steps,
        global_batch=plan.global_batch_size,
        micro=micro,
        world_size=world_size,
        rank=rank,
    )

    # 3. optimizer steps
    for step in range(first_step + 1, plan.max_steps + 1):
        lr = learning_rate(plan, step - 1)
        numbers: dict[str, Tensor] = {}
        waited = 0.0
        for _ in range(accumulation):
            before = time.perf_counter()
            batch = {name: t.to(device) for name, t in next(batches).items()}
            waited += time.perf_counter() - before
            loss, more = stage.loss(engine, batch)
            engine.backward(loss)
            engine.step(lr)
            for name, value in {"loss": loss, **more}.items():
                numbers[name] = numbers.get(name, 0) + value.detach().float() / accumulation
        stage.end_step(engine)
        if plan.ema_decay:
            _average(ema, engine, min(plan.ema_decay, step / (step + 9)))
        means = engine.sum(torch.stack([numbers[name] for name in sorted(numbers)])) / world_size
        meter.step(dict(zip(sorted(numbers), means.tolist(), strict=True)), waited)

        if step % plan.log_every == 0 or step == plan.max_steps:
            values = meter.read() | {"lr": lr}
            loss_value = values["loss"]
            if (norm := engine.grad_norm()) is not None:
                values["grad_norm"] = norm
            if run is not None:
                run.log_metrics(values, step)
            if rank == 0:
                tell(step, values)
        validation.at(step, ema, run)

        if step % plan.checkpoint_every == 0 or step == plan.max_steps:
            told = {} if meter.smoothed is None else {"loss_smoothed": meter.smoothed}
            saved = checkpoint.Checkpoint(step, step * plan.global_batch_size, loss_value, metrics=told)
            if run is not None:
                saved.unsent = run.unsent()  # with these, a checkpoint never runs ahead of the curves
            _checkpoint(out, stage, engine, ema, saved, plan.keep_checkpoints)

    # 4. the trained model
    if rank == 0:
        latest = checkpoint.read_latest(out)
        assert latest
        _export(out, stage, latest[1])
    torch.distributed.barrier()


def _average(ema: dict[str, Tensor], engine: Engine, decay: float) -> None:
    with engine.full_parameters() as parameters, torch.no_grad():
        for name, value in parameters:
            if name in ema:
                ema[name].lerp_(value.float(), 1 - decay)
            else:
                ema[name] = value.float().clone()


def _checkpoint(
    out: Storage, stage: Stage, engine: Engine, ema: dict[str, Tensor], record: checkpoint.Checkpoint, keep: int
) -> None:
    with engine.full_parameters() as parameters:
        trained = {name: value.float().clone() for name, value in parameters}
    optimizer = engine.optimizer_state()
    if engine.rank == 0:
        state = {f"stage.{k}": v for k, v in stage.state().items()} | {f"ema.{k}": v for k, v in ema.items()}
        checkpoint.write(out, record, {"trained": trained, "optimizer": optimizer, "state": state}, keep)
    torch.distributed.barrier()


def _export(out: Storage, stage: Stage, tensors: dict[str, dict[str, Tensor]]) -> None:
    """The averaged weights where there are any, else the last ones."""
    state = tensors["state"]
    averaged = {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}
    rest = {k.removeprefix("stage."): v for k, v in state.items() if k.startswith("stage.")}
    with tempfile.TemporaryDirectory() as folder:
        stage.export(Path(folder), averaged or tensors["trained"], rest)
        publish(Path(folder), out.uri)
