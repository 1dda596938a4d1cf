"""The driver process of a training: progress bar, signals, messages while it waits for nodes, and cancellation.

Workers and Ray Train's controller report to the `Progress` actor, which the driver polls.
"""

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from deedsr.errors import DeeDSRError
from pipelines import cluster
from pipelines.training.health import Stop

if TYPE_CHECKING:
    from pipelines.training.identity import Claim
    from pipelines.training.placement import TrainingPlan

logger = logging.getLogger(__name__)
WITHOUT_GPUS = "--train.gpus_per_worker 0 trains on CPUs"
_NEED_LESS = (
    "fewer --train.num_workers, a smaller --train.micro_batch_size or --train.gradient_checkpointing need less "
    "(the README has what each command takes)"
)
_ANSWER_SECONDS = 5.0
POLL_SECONDS = 0.5
LINE_SECONDS = 30.0  # between two lines where no terminal draws a bar
SHOWN = {  # metric: name and format on the bar
    "loss_smoothed": ("loss", "{:.4f}"),
    "samples_per_second": ("samples/s", "{:.3g}"),
    "lr": ("lr", "{:.2e}"),
    "data_wait_share": ("waiting", "{:.0%}"),
}


class Progress:
    """Ray actor with the latest progress of rank 0, and the state of Ray Train's controller."""

    def __init__(self) -> None:
        self.step, self.values = 0, dict[str, float]()
        self.messages: list[str] = []
        self.asked = Stop.NO
        self.controller: Any = None
        self.requester = ""
        self.working = False

    def report(self, step: int, values: Mapping[str, float]) -> None:
        self.step, self.values = step, dict(values)

    def say(self, message: str) -> None:
        self.messages.append(message)

    def end(self) -> None:
        """Have the workers checkpoint and end."""
        self.asked = Stop.END

    def move(self) -> None:
        """Have the workers checkpoint and restart, in as large a group as fits."""
        self.asked = self.asked or Stop.MOVE

    def stop(self) -> Stop:
        """What the workers are to do. MOVE is returned once."""
        asked = self.asked
        if asked is Stop.MOVE:
            self.asked = Stop.NO
        return asked

    def controlled(self, controller: Any, requester: str) -> None:
        """`controller`: the actor that starts the workers; `requester`: its name in Ray's resource requests."""
        self.controller, self.requester = controller, requester

    def works(self, working: bool) -> None:
        """Whether workers are running, and so can checkpoint."""
        self.working = working

    def look(self) -> tuple[int, dict[str, float], list[str], tuple[Any, str, bool]]:
        """The last step, its numbers, new messages, and of Ray Train: the controller, None before it has started, its
        name in requests, and whether its workers are running."""
        messages, self.messages = self.messages, []
        return self.step, self.values, messages, (self.controller, self.requester, self.working)


class Lines:
    """Output of tqdm without a terminal: one line per update."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(name: str, total: int, initial: int, show: bool) -> tqdm:
    """A progress bar with rate and ETA on a terminal; elsewhere a line every `LINE_SECONDS`."""
    options: dict[str, Any] = {"total": total, "initial": initial, "desc": name, "unit": "step", "disable": not show}
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "miniters": 1}
    return tqdm(**options)


def advance(shown: tqdm, step: int, values: Mapping[str, float]) -> None:
    """Move the bar to `step`; the first one is shown at once, whatever the time between two lines."""
    shown.set_postfix(postfix(values), refresh=False)
    if not shown.disable and shown.n == shown.initial:  # a bar that is not shown has no `initial`
        shown.n = step
        shown.refresh()
    else:
        shown.update(step - shown.n)


def postfix(values: Mapping[str, float]) -> dict[str, str]:
    """Metrics formatted for the bar."""
    return {label: form.format(values[name]) for name, (label, form) in SHOWN.items() if name in values}


@contextmanager
def progress_actor() -> Iterator[Any]:
    """The handle of a `Progress` actor."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node: the workers depend on it, and another node may be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Progress).remote()
    try:
        yield actor
    finally:
        ray.kill(actor)


def supervised(stage: str, trainer: Any, progress: Any, shown: tqdm, plan: "TrainingPlan", claim: "Claim") -> None:
    """Runs `trainer.fit`. On return or exception Ray Train's controller and its workers are ended.

    Raises KeyboardInterrupt after a signal: once the workers have checkpointed, or at once where none are running or at
    a second signal. Raises Superseded where the heartbeat has lost the claim, DeeDSRError for a failed training.
    """
    outcome: Future[Any] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit().return_value)
        except BaseException as error:
            outcome.set_exception(error)

    # Not on the main thread, where Ray would handle Ctrl-C itself, without a checkpoint.
    threading.Thread(target=fit, daemon=True).start()
    with _ended_by_signals(progress) as interrupted:
        try:
            said = _awaited(outcome, progress, shown, plan, claim, interrupted)
        except DeeDSRError:
            raise
        except Exception as error:
            failure = _explained(stage, error)
            if interrupted.is_set():  # workers that had no step to checkpoint after
                logger.warning("%s", failure)
                raise KeyboardInterrupt from error
            raise failure from error
        finally:
            _end_controller(progress)
    if interrupted.is_set():
        raise KeyboardInterrupt(said)
    if said:
        raise DeeDSRError(said)


def _awaited(
    outcome: Future[Any], progress: Any, shown: tqdm, plan: "TrainingPlan", claim: "Claim", interrupted: threading.Event
) -> str | None:
    import ray

    waiting: cluster.Waiting | None = None
    while True:
        done = wait([outcome], POLL_SECONDS).done
        step, values, messages, (controller, _, working) = ray.get(progress.look.remote())
        for message in messages:
            tqdm.write(message, file=sys.stderr)
        if step > shown.n:
            advance(shown, step, values)
        if done:
            return outcome.result()
        if controller is None:  # not started yet
            continue
        waiting = None if working else waiting or cluster.Waiting(plan, WITHOUT_GPUS if plan.gpus else "")
        if waiting:
            if interrupted.is_set():  # no worker can checkpoint
                raise KeyboardInterrupt
            with suppress(Exception):  # Ray's control plane may be unreachable
                waiting.say()
        if claim.lost:
            claim.check()


def _end_controller(progress: Any) -> None:
    """Kills a controller that still runs, with its workers, and cancels its resource requests.

    Otherwise the same command would wait three minutes for the resources, which an elastic training counts as taken.
    """
    import ray

    with suppress(Exception):  # it has ended by itself, or Ray is gone
        *_, (controller, requester, _) = ray.get(progress.look.remote(), timeout=_ANSWER_SECONDS)
        if controller is not None:
            ray.kill(controller)
            coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
            ray.get(coordinator.cancel_request.remote(requester), timeout=_ANSWER_SECONDS)


@contextmanager
def _ended_by_signals(progress: Any) -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C make the workers checkpoint and end; a second signal interrupts at once."""
    interrupted = threading.Event()

    def handle(number: int, frame: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        name = signal.Signals(number).name
        logger.info("%s: the training ends, workers at work checkpoint first; once more ends it at once", name)
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
    """The first DeeDSRError among the causes, else an error with the last line of the worker's."""
    seen: BaseException | None = error
    while seen is not None:
        at_start = getattr(seen, "controller_failure", None)
        for inner in (seen, at_start, *getattr(seen, "worker_failures", {}).values()):
            cause = getattr(inner, "cause", None) or inner
            if isinstance(cause, DeeDSRError):
                return cause
        seen = seen.__cause__ or seen.__context__
    last = cluster.failure_message(error, _NEED_LESS)
    return DeeDSRError(
        f"training the {stage} failed: {last}. What was checkpointed stays; the same command continues from there"
    )
