"""The training loop of every worker: `Loop.train` reads top to bottom, and its steps are the other methods."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deedsr.precision import set_tf32
from pipelines.data.dataset import Dataset
from pipelines.data.loader import Batch, follow, micro_batches
from pipelines.data.order import SampleOrder
from pipelines.data.shard_cache import ShardCache
from pipelines.storage import open_storage, publish, waiting
from pipelines.storage.errors import FAILURES
from pipelines.storage.lock import scratch_folder
from pipelines.training import checkpoint
from pipelines.training.config import AdapterOptions, LearnerOptions, TrainOptions, micro_batch
from pipelines.training.engine import Engine, on_cpu
from pipelines.training.health import (
    MOST_IN_A_ROW,
    BlockedReads,
    Ended,
    LossWindow,
    Moved,
    Stop,
    Untrainable,
    Unwritable,
    Watchdog,
    record_of_skipped,
)
from pipelines.training.identity import Claim
from pipelines.training.metrics import Meter, record_part
from pipelines.training.placement import decided
from pipelines.training.schedules import learning_rate
from pipelines.training.stage import Stage, under, write_model
from pipelines.training.validation import Validation

if TYPE_CHECKING:
    from pipelines.tracking import Point, Run

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0  # between two looks at a checkpoint that is being written
VALIDATION_SECONDS = 1800.0  # that a validation may take before a worker counts as hung


def make_stage(options: LearnerOptions | AdapterOptions, dataset: Dataset) -> Stage:
    if isinstance(options, LearnerOptions):
        from pipelines.training.learner_stage import LearnerStage

        return LearnerStage(options)
    from pipelines.training.adapter_stage import AdapterStage

    return AdapterStage(options, dataset.scale, dataset.manifest.latents)


class MicroBatches(NamedTuple):
    """Of one worker in one optimizer step: sums of what the loss gave, the batches, seconds waited for them."""

    sums: dict[str, Tensor]
    batches: list[Batch]
    waited: float


class Loop:
    """The training of one worker: `train` is called once. Needs a process group; every worker makes one.

    Args:
        run: where rank 0 logs metrics; None on the others.
        report: gets the first step, and each logged step with its numbers, on rank 0.
        asked: whether this worker is to stop. Once one is, all checkpoint after the same step and raise Moved or Ended.
        claim: of these workers on `--out`; rank 0 raises Superseded before it would write there when it is
            another's.
        say: gets a line every half minute while storage is waited for.
    """

    def __init__(
        self,
        stage: Stage,
        dataset: Dataset,
        device: torch.device,
        run: "Run | None",
        report: Callable[[int, dict[str, float]], Any] = lambda step, values: None,
        asked: Callable[[], Stop] = lambda: Stop.NO,
        claim: Claim | None = None,
        say: Callable[[str], Any] = logger.warning,
    ):
        self.stage, self.device, self.run = stage, device, run
        self.plan: TrainOptions = stage.options.train
        if self.plan.exact_sums is None:  # not by a command, which decides before it records the run
            self.plan = decided(self.plan, device.type == "cuda")
        self.report, self.asked, self.say = report, asked, say
        self.out = open_storage(stage.options.out)
        self.check = claim.check if claim else lambda: None
        self.run_id, self.attempt = (claim.run_id, claim.attempt) if claim else ("", 0)
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.index = dataset.index("train")
        self.order = SampleOrder(self.index, dataset.order_digest, self.plan.seed, together=stage.together)
        keep = checkpoint.Keep(self.plan.keep_checkpoints, self.plan.best_metric, self.plan.best_mode)
        self.watchdog = Watchdog(self.plan.hang_seconds)
        store = torch.distributed.distributed_c10d._get_default_store()  # torch has no other name for it
        self.blocked = BlockedReads(self.watchdog, store, self.rank, asked, say)
        self.writer = checkpoint.Writer(self.out, keep, self.check, say)
        self.shards = ShardCache(int(self.plan.cache_gb * 1e9))
        self.dataset = replace(dataset, through=self.shards.open)

        self.losses = LossWindow(self.plan.spike_sigma)
        self.latest: dict[str, float] = {}  # what was logged last, by metric
        self.loss_value = math.nan  # of the last step taken
        self.first_step = 0
        self.final: tuple[checkpoint.Checkpoint, checkpoint.Tensors] | None = None  # of the last step

    def train(self) -> None:
        """From the last checkpoint to `train.max_steps`, and write the model.

        Raises:
            Moved, Ended: `asked` to.
            Untrainable: the loss is of no use.
            Unwritable: storage takes no checkpoint.
        """
        plan = self.plan
        with self.watchdog, self.blocked, self.writer, self.shards:
            self.restore()
            for step in range(self.first_step + 1, plan.max_steps + 1):
                micro = self.gradients()
                values, stop = self.agreed(micro.sums)
                self.update(step, values, micro)
                if step % plan.log_every == 0 or step == plan.max_steps:
                    self.log(step)
                elif step == self.first_step + 1 and self.rank == 0:
                    self.report(step, {})
                if self.validation.due(step):
                    self.validate(step)
                self.watchdog.beat()
                if stop or step % plan.checkpoint_every == 0 or step == plan.max_steps:
                    self.save(step)
                if stop:
                    self.leave(step, stop)
            self.export()

    def restore(self) -> None:
        """Networks, engine and data, as the last checkpoint left them."""
        plan = self.plan
        if plan.tf32 is not None:
            set_tf32(plan.tf32)
        module = self.stage.build(self.device, torch.bfloat16 if plan.precision == "bf16" else torch.float32)
        with self.blocked.reading():
            found = checkpoint.read_agreed(self.out, self.device)
        last, tensors = found or (None, dict.fromkeys(checkpoint.PARTS, {}))
        state = tensors["state"]
        if last:
            self.final = found if last.step >= plan.max_steps else None
            self.first_step, self.loss_value, self.latest = last.step, last.loss, last.metrics
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(tensors["trained"][name])
            self.stage.load_state(under(state, "stage."))
            self.losses.load_state(under(state, "losses."))
        micro, self.accumulation = micro_batch(plan, self.world_size, self.stage.options.unit)
        self.engine = Engine(
            module,
            plan,
            micro=micro,
            accumulation=self.accumulation,
            optimizer_state=tensors["optimizer"],
            averages=under(state, "ema."),
        )
        self.meter = Meter(plan.global_batch_size, self.device, self.latest.get("loss_smoothed"))
        self.validation = Validation(self.stage, self.dataset, self.engine, micro)
        self.batches = micro_batches(
            self.order,
            lambda epoch, row: self.stage.sample(self.dataset, self.index, row, epoch),
            first_step=self.first_step,
            last_step=self.plan.max_steps,
            global_batch=self.plan.global_batch_size,
            micro=micro,
            world_size=self.world_size,
            rank=self.rank,
            threads=self.plan.loader_threads or 2,
            pinned=self.device.type == "cuda",
            at=follow(self.shards, self.order, self.index),
        )

    def gradients(self) -> MicroBatches:
        """Forward and backward of the micro-batches of one optimizer step."""
        sums: dict[str, Tensor] = {}
        read, waited = [], 0.0
        for part in range(self.accumulation):
            before = time.perf_counter()
            with self.blocked.reading():
                read.append(next(self.batches))
            batch = {name: t.to(self.device, non_blocking=True) for name, t in read[-1].items()}
            waited += time.perf_counter() - before
            loss, more = self.stage.loss(self.engine, batch)
            self.engine.backward(loss)
            for name, value in {"loss": loss, **more}.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
            if part < self.accumulation - 1:
                self.engine.accumulate()
        return MicroBatches(sums, read, waited)

    def agreed(self, sums: dict[str, Tensor]) -> tuple[dict[str, float], Stop]:
        """Means over the workers, and whether they stop after this step; the same on every worker.

        All of them raise Unwritable where the checkpoint writer of rank 0 has given up.
        """
        names = sorted(sums)
        values_N = torch.stack([sums[name] for name in names])  # float64: in any order the same
        failure, asked = self.writer.failure, self.asked()
        asks = values_N.new_tensor([asked is Stop.MOVE, asked is Stop.END, failure is not None])
        *values, move, end, failed = self.engine.sum(torch.cat([values_N, asks])).tolist()
        if failed:
            raise Unwritable(str(failure or "a checkpoint could not be written"))
        means = {name: value / self.engine.micro_batches for name, value in zip(names, values, strict=True)}
        return means, Stop.END if end else Stop.MOVE if move else Stop.NO

    def update(self, step: int, values: dict[str, float], micro: MicroBatches) -> None:
        """The optimizer step, or none where loss or gradient cannot be trusted."""
        self.meter.step(values, micro.waited)
        anomaly = self.losses.anomaly(values["loss"])
        if not self.engine.step(learning_rate(self.plan, step - 1), take=anomaly is None):
            self._skip(step, anomaly or "the gradient is not finite", values, micro.batches)
            return
        self.stage.end_step(self.engine)
        if self.plan.ema_decay:
            self.engine.average(min(self.plan.ema_decay, step / (step + 9)))
        self.loss_value = values["loss"]
        self.losses.take(self.loss_value)

    def _skip(self, step: int, reason: str, values: dict[str, float], batches: list[Batch]) -> None:
        """Record a step that was not taken; raises Untrainable where the run should not go on."""
        plan = self.plan
        self.stage.drop_step()
        self.losses.skip()
        positions = self.order.slice((step - 1) * plan.global_batch_size, step * plan.global_batch_size)
        record = {
            "step": step,
            "reason": reason,
            "lr": learning_rate(plan, step - 1),
            "world_size": self.world_size,
            "samples": [{"epoch": epoch, "key": self.index["key"][row].as_py()} for epoch, row in positions],
            **values,
            "grad_norm": self.engine.grad_norm(),
        }
        batch = {name: torch.cat([part[name] for part in batches]) for name in batches[0]}
        place = f"{self.out.uri}/incidents/step-{step:08d}.json"
        self.writer.record(step, record_of_skipped(step, record, batch, self.rank))
        logger.warning("step %d is not taken: %s (%s)", step, reason, place)
        if plan.on_spike == "skip" and self.losses.in_a_row < MOST_IN_A_ROW:
            return
        self._until_written()  # the run goes on from there
        self.writer.end_records()
        why = "train.on_spike is stop" if plan.on_spike == "stop" else f"so were the {MOST_IN_A_ROW - 1} steps before"
        raise Untrainable(
            f"step {step} was not taken, because {reason}, and {why}: its samples are in {place}. "
            "The same command goes on from the last checkpoint; to pass over such batches, --train.on_spike skip"
        )

    def log(self, step: int) -> None:
        """A point of the curves."""
        values = self.meter.read() | {
            "lr": learning_rate(self.plan, step - 1),
            "grad_norm": self.engine.grad_norm(),
            "skipped_steps": self.losses.skipped,
        }
        self.latest = self.latest | values
        if self.run is not None:
            self.run.log_metrics(values, step)
        if self.rank == 0:
            self.report(step, values)

    def validate(self, step: int) -> None:
        self.watchdog.allow(VALIDATION_SECONDS)
        self.latest = self.latest | self.validation.compute(step, self.run)

    def save(self, step: int) -> None:
        """Copy all that a continuation needs, and begin to write it."""
        stalled = time.perf_counter()
        self._until_written()
        tensors = self._gathered()
        metrics = {name: value for name, value in self.latest.items() if math.isfinite(value)}
        saved = checkpoint.Checkpoint(
            step,
            step * self.plan.global_batch_size,
            self.loss_value,
            metrics=metrics | {"loss": self.losses.mean},
            run_id=self.run_id,
            attempt=self.attempt,
        )
        points: list[Point] = []
        if self.run is not None:
            self.run.log_metrics({"checkpoint_stall_seconds": time.perf_counter() - stalled}, step)
            points = self.run.logged()
        if self.rank == 0:
            self.final = (saved, tensors) if step == self.plan.max_steps else None
            self.writer.start(saved, tensors, record_part(points, self.attempt, step))
        self.watchdog.beat()

    def leave(self, step: int, stop: Stop) -> None:
        """Raises Moved or Ended once the checkpoint of this step is committed."""
        self._until_written()
        self.writer.end_records()
        raise Moved(step) if stop is Stop.MOVE else Ended(step)

    def export(self) -> None:
        """Write the trained model."""
        self.watchdog.allow(waiting.limit())
        with scratch_folder() as folder:
            lost = None
            if self.rank == 0:  # while the last checkpoint is written
                assert self.final
                last, tensors = self.final
                lost = self._patiently(lambda: write_model(self.stage, folder, self.dataset, last, tensors))
            self._until_written()
            if self.rank == 0 and lost is None:
                lost = self._patiently(lambda: self._publish(folder))
        if self.engine.sum(torch.tensor(float(lost is not None), device=self.device)):
            raise Unwritable(f"the model could not be written: {lost}")

    def _patiently(self, work: Callable[[], None]) -> Exception | None:
        """Repeats what storage or a disk refuses for as long as `waiting` says; then why it was given up."""
        try:
            with waiting.within(say=self.say):
                waiting.patiently(work)
        except FAILURES as error:
            return error
        return None

    def _publish(self, folder: Path) -> None:
        self.check()
        publish(folder, self.out.uri)

    def _gathered(self) -> checkpoint.Tensors:
        """Copies of all that a continuation needs, on the CPU of rank 0; a collective."""
        trained = {name: on_cpu(value.float()) for name, value in self.engine.full_parameters() if self.rank == 0}
        optimizer = self.engine.optimizer_state()
        averages = {name: on_cpu(value) for name, value in self.engine.averages() if self.rank == 0}
        if self.rank:
            return {}
        held = {"stage.": self.stage.state(), "losses.": self.losses.state()}
        state = {prefix + name: on_cpu(t) for prefix, tensors in held.items() for name, t in tensors.items()}
        state |= {f"ema.{name}": value for name, value in averages.items()}
        return {"trained": trained, "optimizer": optimizer, "state": state}

    def _until_written(self) -> None:
        """Wait until the last checkpoint is committed, or given up because the run is to end. A collective: all workers
        raise alike, and their watchdogs allow for it, as they do not within a step."""
        self.watchdog.allow(waiting.limit())
        while True:
            busy = self.writer.busy(POLL_SECONDS)
            given_up = busy and self.asked() is Stop.END and self.writer.give_up()
            failure = self.writer.failure
            state = torch.tensor([busy, given_up, failure is not None], dtype=torch.float32).to(self.device)
            busy, given_up, failed = self.engine.sum(state).tolist()
            if failed or given_up:
                raise Unwritable(str(failure or "ended before storage took the checkpoint"))
            if not busy:
                return
