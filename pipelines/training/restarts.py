"""When Ray Train starts the workers again, how many, and what the driver learns of it. Runs in Ray Train's controller.

It leans on what is Ray's own, in the version that is pinned: look here when that changes.
"""

import time
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from deedsr.errors import UsageError
from pipelines.training.interruption import Moved

__all__ = ["ElasticPolicy", "GroupWatch", "RestartPolicy"]

_WITHOUT_WORKERS = {"INITIALIZING", "SCHEDULING", "RESCHEDULING", "RESTARTING", "RESIZING"}
_PAUSE = 0.2  # seconds
_LONGEST_REASON = 200  # characters


class RestartPolicy(DefaultFailurePolicy):
    """Ray Train's, but that planned moves cost nothing of `max_failures` and a UsageError ends the run: it would come
    again. Each restart is one line for the user."""

    def __init__(self, failures: FailureConfig, progress: Any):
        super().__init__(failures)
        self.progress = progress

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        moved = next((failure for failure in failures if isinstance(failure, Moved)), None)
        refused = any(isinstance(getattr(failure, "cause", None) or failure, UsageError) for failure in failures)
        if refused and not moved:
            return FailureDecision.RAISE
        # With one of them, what the others say follows from it: a connection is reset where a peer has ended.
        decision = FailureDecision.RETRY if moved else super().make_decision(training_failed_error)
        waits_for_nodes = isinstance(training_failed_error, ControllerError)
        if decision == FailureDecision.RETRY and not waits_for_nodes:
            reason = str(moved) if moved else f"workers failed: {_reason(training_failed_error)}"
            self.progress.say.remote(f"{reason}. They are started again from the last checkpoint")
        return decision


class ElasticPolicy(ElasticScalingPolicy):
    """Ray Train's, but that workers checkpoint before there are more or fewer of them: Ray Train would end them where
    they are, and lose the steps since the last checkpoint."""

    def __init__(self, scaling_config: ScalingConfig, progress: Any):
        super().__init__(scaling_config)
        self.progress = progress

    def make_decision_for_running_worker_group(self, **group: Any) -> ScalingDecision:
        if not isinstance(super().make_decision_for_running_worker_group(**group), NoopDecision):
            self.progress.move.remote()  # they end as moved, and are started again in the new size
        return NoopDecision()


class GroupWatch(ControllerCallback):
    """Tells `progress` who starts the workers, and whether they are at work."""

    def __init__(self, progress: Any):
        self.progress = progress
        self._state = ""

    def after_controller_start(self, train_run_context: Any) -> None:
        # As `ScalingPolicy` names itself.
        requester = f"train-{train_run_context.run_id}"
        self.progress.controlled.remote(ray.get_runtime_context().current_actor, requester)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        name = current_state._state_type.state_name
        if name != self._state:
            self._state = name
            self.progress.works.remote(name not in _WITHOUT_WORKERS)
        elif name in _WITHOUT_WORKERS:
            time.sleep(_PAUSE)  # an elastic run without its fewest workers asks again at once, with a whole CPU


def _reason(error: TrainingFailedError) -> str:
    """Of all that the workers say what the rest follows from, else the last line of the first."""
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    if any(isinstance(getattr(f, "health_check_failure", f), RayActorError) for f in failures):
        return "the process or the node of one is gone"
    text = str(next(iter(failures), error)).strip()
    return text.splitlines()[-1].strip()[:_LONGEST_REASON] if text else type(error).__name__
