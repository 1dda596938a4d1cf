"""The whole chain as one job: shards, learner, latents, adapter and evaluation, one after the other.

The sections hold the options of the commands `shards`, `train learner`, `latents`, `train adapter` and `evaluate`; what
a step takes from the steps before it, and where it writes, is filled in: `auto`. Each step requests its own resources.
The same command again skips what is done with the same inputs, and continues the rest as the command of the step would.
In MLflow the runs of the steps are children of one run.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from deedsr.dataset.manifest import MANIFEST
from deedsr.errors import UsageError
from jobs import evaluate, latents, shards, train_adapter, train_learner
from jobs.command import Command, Outcome
from jobs.latents import LatentsOptions
from jobs.shards import ShardsOptions
from pipelines import tracking
from pipelines.claims import Claim, held
from pipelines.inference.options import EvaluateOptions
from pipelines.storage import open_storage
from pipelines.training.config import AdapterOptions, LearnerOptions
from pipelines.training.schedules import PRESETS

if TYPE_CHECKING:
    from pipelines.shards.execute import Job

logger = logging.getLogger(__name__)
AUTO = "auto"


@dataclasses.dataclass
class ShardsStep(ShardsOptions):
    out: Annotated[str, "the dataset; auto = OUT/shards"] = AUTO


@dataclasses.dataclass
class LearnerStep(LearnerOptions):
    data: Annotated[str, "degradation shards; auto = those of this chain"] = AUTO
    out: Annotated[str, "checkpoints and the trained learner; auto = OUT/learner"] = AUTO


@dataclasses.dataclass
class LatentsStep(LatentsOptions):
    data: Annotated[str, "degradation shards; auto = those of this chain"] = AUTO
    base: Annotated[str, "auto = the chain's"] = AUTO
    learner: Annotated[str | None, "auto = that of this chain; null = keep the LR images instead of vectors"] = AUTO
    out: Annotated[str, "the dataset of latents; auto = OUT/latents"] = AUTO


@dataclasses.dataclass
class AdapterStep(AdapterOptions):
    data: Annotated[str, "shards of pixels or latents; auto = the latents of this chain"] = AUTO
    learner: Annotated[str, "auto = that of this chain"] = AUTO
    base: Annotated[str, "auto = the chain's"] = AUTO
    out: Annotated[str, "checkpoints and the trained model folder; auto = OUT/adapter"] = AUTO


@dataclasses.dataclass(kw_only=True)
class EvaluateStep(EvaluateOptions):
    model: Annotated[str, "auto = the adapter of this chain"] = AUTO
    data: Annotated[str, "degradation shards; auto = those of this chain"] = AUTO
    out: Annotated[str, "where figures and pictures go; auto = OUT/evaluation"] = AUTO


@dataclasses.dataclass
class ChainOptions:
    out: Annotated[str, "of the whole chain: folder or s3://bucket/prefix"]
    base: Annotated[str, "frozen diffusion model: `tiny`, a diffusers folder or URI, or a hub id"] = "tiny"
    shards: ShardsStep = dataclasses.field(default_factory=ShardsStep)
    learner: LearnerStep = dataclasses.field(default_factory=LearnerStep)
    latents: LatentsStep = dataclasses.field(default_factory=LatentsStep)
    adapter: AdapterStep = dataclasses.field(default_factory=AdapterStep)
    evaluate: EvaluateStep = dataclasses.field(default_factory=EvaluateStep)
    experiment: Annotated[str, "MLflow experiment of the run above those of the steps"] = "deedsr-chain"


class Step(NamedTuple):
    """A step: its section and command, and the job of one that makes a dataset.

    The commands of trainings and evaluations find out themselves that nothing is left to do, and start no run then.
    """

    name: str
    command: Command
    job: "Callable[[Any], Job] | None" = None


STEPS = (
    Step("shards", shards.COMMAND, shards.job),
    Step("learner", train_learner.COMMAND),
    Step("latents", latents.COMMAND, latents.job),
    Step("adapter", train_adapter.COMMAND),
    Step("evaluate", evaluate.COMMAND),
)


def steps(options: ChainOptions) -> Iterator[tuple[Step, Any]]:
    """Each step with the options of its command, in which what was `auto` is filled in."""
    out = options.out.rstrip("/")
    outs = {name: getattr(options, name).out for name in ("shards", "learner", "latents", "adapter")}
    outs = {name: f"{out}/{name}" if place == AUTO else place for name, place in outs.items()}
    filled = {
        "shards": {"out": outs["shards"]},
        "learner": {"data": outs["shards"], "out": outs["learner"]},
        "latents": {"data": outs["shards"], "base": options.base, "learner": outs["learner"], "out": outs["latents"]},
        "adapter": {"data": outs["latents"], "base": options.base, "learner": outs["learner"], "out": outs["adapter"]},
        "evaluate": {"data": outs["shards"], "model": outs["adapter"], "out": f"{out}/evaluation"},
    }
    for step in STEPS:
        given = getattr(options, step.name)
        values = {field.name: getattr(given, field.name) for field in dataclasses.fields(step.command.options)}
        values |= {key: value for key, value in filled[step.name].items() if values[key] == AUTO}
        yield step, step.command.options(**values)


def check(options: ChainOptions) -> None:
    """Refuses what any of the steps would refuse, and steps that would write into each other's places."""
    for name in ("plan", "gc"):
        if getattr(options.shards, name):
            raise UsageError(f"shards.{name} is not for a chain, which makes shards and removes none: leave it out")
    for name in ("shards", "latents"):
        if not getattr(options, name).tracking:
            raise UsageError(f"{name}.tracking false: the steps of a chain are runs in MLflow: leave it out")
    places = {open_storage(options.out).uri: "out"}
    for step, own in steps(options):
        try:
            step.command.check(own)
        except UsageError as error:
            raise UsageError(f"{step.name}: {error}") from None
        other = places.setdefault(open_storage(own.out).uri, f"{step.name}.out")
        if other != f"{step.name}.out":
            raise UsageError(f"{step.name}.out and {other} are both {own.out}: give each a place of its own")


def run(options: ChainOptions) -> Outcome:
    check(options)
    out = open_storage(options.out)
    out.require_writable()
    with held(Claim(out)) as claim:
        return Chain(options, claim).run()


class Chain:
    """The steps one after the other, and the run above theirs, which begins with the first step that does something."""

    def __init__(self, options: ChainOptions, claim: Claim):
        self.options, self.claim = options, claim
        self.place = tracking.masked_uri(claim.out.uri)
        self.run_id = tracking.find_run(options.experiment, {"deedsr.kind": "chain", "deedsr.out": self.place})
        self.parent: tracking.Run | None = None  # while it is written
        self.idle = True  # the step at work has begun no run
        self.stack = ExitStack()

    def run(self) -> Outcome:
        outcomes: dict[str, Outcome] = {}
        skipped = []
        with self.stack:
            for number, (step, own) in enumerate(steps(self.options), 1):
                self.claim.check()
                logger.info("chain: %d of %d, %s: %s", number, len(STEPS), step.name, own.out)
                outcomes[step.name] = self._done(step, own)
                if self.idle:
                    skipped.append(step.name)
                    logger.info("chain: %s skipped: %s is done, of the same inputs and options", step.name, own.out)
                if step.name == "shards":
                    self._require_validation(outcomes["shards"], own.out)
            if self._ended_early():
                self._parent()
            if self.parent:
                self._log_results(self.parent, outcomes)
        values = {name: dict(outcome.values) for name, outcome in outcomes.items()}
        complete = all(outcome.complete for outcome in outcomes.values())
        return Outcome({"run_id": self.run_id, "skipped": skipped, **values}, complete=complete)

    def _done(self, step: Step, own: Any) -> Outcome:
        """A step's result, made now or there already, with the run that made it."""
        from pipelines.shards.generate import finished

        self.idle = True
        made = finished(step.job(own)) if step.job else None
        of_dataset = {"deedsr.kind": step.name, "deedsr.dataset.digest": made.digest} if made else {}
        if made and (run_id := tracking.find_run(None, of_dataset)):
            return Outcome(dataclasses.asdict(made) | {"run_id": run_id})
        with tracking.children_of(self._parent):
            return step.command(own)

    def _parent(self) -> str:
        """Id of the run above, below which another one begins."""
        self.idle = False
        if self.parent is None:
            own = {step.name: dataclasses.asdict(options) for step, options in steps(self.options)}
            run = tracking.start_run(
                self.options.experiment,
                name=self.place.rpartition("/")[2],
                config={**{key: getattr(self.options, key) for key in ("out", "base", "experiment")}, **own},
                run_id=self.run_id,
                tags={"deedsr.kind": "chain"},
                system_metrics=False,
                fault_tolerant=True,
                permit=self.claim.holds,
                out=self.claim.out.uri,
            )
            self.parent, self.run_id = self.stack.enter_context(run), run.id
        return self.parent.id

    def _ended_early(self) -> bool:
        """Whether there is nothing left to do below a run that was killed, or that failed, after that."""
        if self.run_id is None or self.parent:
            return False
        return tracking.connect(tracking.tracking_uri()).get_run(self.run_id).info.status != "FINISHED"

    def _require_validation(self, shards: Outcome, place: str) -> None:
        """Refuses, before the trainings, an evaluation on pairs that there are none of."""
        from pipelines.data.dataset import Dataset, no_validation

        evaluate = self.options.evaluate
        if evaluate.data == AUTO and evaluate.split == "validation" and not shards.values["validation"]:
            dataset = Dataset.open(place)
            raise UsageError(f"{no_validation(dataset.uri, dataset.recipe)}; or give evaluate.split train")

    def _log_results(self, run: tracking.Run, outcomes: dict[str, Outcome]) -> None:
        """The dataset, and the figures at the adapter's step: a longer training is evaluated again. By both, `compare`
        shows chains side by side."""
        made = outcomes["shards"].values
        dataset = tracking.DatasetInput(made["digest"], made["manifest"].removesuffix(f"/{MANIFEST}"))
        run.later(lambda: run.log_dataset(dataset, context="chain"))
        figures = {
            f"{method}.{name}": figure["mean"]
            for method, found in outcomes["evaluate"].values["metrics"].items()
            for name, figure in found.items()
            if figure["mean"] is not None
        }
        run.log_metrics(figures, outcomes["adapter"].values["step"])


COMMAND = Command(
    ChainOptions,
    run,
    tracked="chain",
    # Those that both trainings have.
    presets={name: {stage: PRESETS[stage][name] for stage in PRESETS} for name in PRESETS["learner"]},
    check=check,
    example="deedsr chain --shards.source photos --out chain --preset tiny",
)
