"""The driver beside Ray Train: signals, lines while it waits for nodes, and an end whenever one is asked for."""

import logging
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Any

from deedsr.errors import DeeDSRError
from pipelines import cluster
from pipelines.training.claim import Claim
from pipelines.training.placement import TrainingPlan

__all__ = ["WITHOUT_GPUS", "supervised"]

logger = logging.getLogger(__name__)
WITHOUT_GPUS = "--train.gpus_per_worker 0 trains on CPUs"
_NEED_LESS = (
    "fewer --train.num_workers, a smaller --train.micro_batch_size or --train.gradient_checkpointing need less "
    "(the README has what each command takes)"
)
_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 5.0


def supervised(stage: str, trainer: Any, progress: Any, plan: TrainingPlan, claim: Claim) -> None:
    """Runs `trainer.fit`. Leaving it, also by an exception, ends Ray Train's controller and with it the workers.

    Raises KeyboardInterrupt after a signal: once the workers have checkpointed, at once where none are at work or at
    the second signal. Raises Superseded where the heartbeat has lost the claim, DeeDSRError for what went wrong.
    """
    outcome: Future[Any] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit().return_value)
        except BaseException as error:
            outcome.set_exception(error)

    # Not on the main thread: there Ray would answer Ctrl-C itself, without a checkpoint. Nobody has to wait for it.
    threading.Thread(target=fit, daemon=True).start()
    with _ended_by_signals(progress) as interrupted, _ending_controller(progress):
        try:
            said = _awaited(outcome, progress, plan, claim, interrupted)
        except DeeDSRError:
            raise
        except Exception as error:
            failure = _explained(stage, error)
            if interrupted.is_set():  # workers that had no step to checkpoint after
                logger.warning("%s", failure)
                raise KeyboardInterrupt from error
            raise failure from error
    if interrupted.is_set():
        raise KeyboardInterrupt(said)
    if said:
        raise DeeDSRError(said)


def _awaited(
    outcome: Future[Any], progress: Any, plan: TrainingPlan, claim: Claim, interrupted: threading.Event
) -> str | None:
    import ray

    waiting: cluster.Waiting | None = None
    while not wait([outcome], _POLL_SECONDS).done:
        controller, working = ray.get(progress.group.remote())
        if controller is None:  # it begins
            continue
        waiting = None if working else waiting or cluster.Waiting(plan, WITHOUT_GPUS if plan.gpus else "")
        if waiting:
            if interrupted.is_set():  # there is nobody to checkpoint
                raise KeyboardInterrupt
            with suppress(Exception):  # while Ray's control plane is away there is nothing to say
                waiting.say()
        if claim.lost:
            claim.check()
    return outcome.result()


@contextmanager
def _ending_controller(progress: Any) -> Iterator[None]:
    """Ends the controller if it is there still; Ray ends its workers with it, and reserves nothing for them any more.

    An elastic training counts what is reserved for others as taken: the same command again would wait three minutes.
    """
    try:
        yield
    finally:
        import ray

        with suppress(Exception):  # it has ended by itself, or Ray is gone
            asked = [progress.group.remote(), progress.reserved_by.remote()]
            (controller, _), requester = ray.get(asked, timeout=_ANSWER_SECONDS)
            if controller is not None:
                ray.kill(controller)
                coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
                ray.get(coordinator.cancel_request.remote(requester), timeout=_ANSWER_SECONDS)


@contextmanager
def _ended_by_signals(progress: Any) -> Iterator[threading.Event]:
    """Within it, SIGTERM and Ctrl-C have the workers checkpoint and end; a second one interrupts at once."""
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
    """The first cause that a user can act on, else the last line of what the worker said."""
    seen: BaseException | None = error
    while seen is not None:
        at_start = getattr(seen, "controller_failure", None)
        for inner in (seen, at_start, *getattr(seen, "worker_failures", {}).values()):
            cause = getattr(inner, "cause", None) or inner
            if isinstance(cause, DeeDSRError):
                return cause
        seen = seen.__cause__ or seen.__context__
    last = cluster.last_words(error, _NEED_LESS)
    return DeeDSRError(
        f"training the {stage} failed: {last}. What was checkpointed stays; the same command continues from there"
    )
