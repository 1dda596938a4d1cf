"""What of Ray Train is set otherwise than by default: the workers' processes, restarts, the number of workers.

It uses private classes of Ray, in the version that is pinned: look here when that changes.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import ray
import ray.train.torch
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from deedsr.errors import DeeDSRError, UsageError
from pipelines.claims import Superseded
from pipelines.data.dataset import Dataset
from pipelines.models import usable_device
from pipelines.storage import open_storage, require_here
from pipelines.training.health import Ended, Moved, Stop, Untrainable, Unwritable, listen, terminated
from pipelines.training.identity import Claim
from pipelines.training.loop import Loop, make_stage
from pipelines.training.metrics import record_part, recorded

logger = logging.getLogger(__name__)

_WITHOUT_WORKERS = {"INITIALIZING", "SCHEDULING", "RESCHEDULING", "RESTARTING", "RESIZING"}
_PAUSE = 0.2  # seconds
_LONGEST_REASON = 200  # characters
NODE_SECONDS = 90.0  # by then Ray knows of a node that is gone


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        device = "cuda" if backend_config.backend == "nccl" else "cpu"
        with _starting(worker_group):
            worker_group.execute(use_device, device)
            addresses = worker_group.execute(ray.util.get_node_ip_address)
            if len(set(addresses)) > 1:  # workers of one node connect through any interface, loopback included
                for rank, address in enumerate(addresses):
                    worker_group.execute_single(rank, use_interface_of, address)
            super().on_start(worker_group, backend_config)

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        with _starting(worker_group):
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(listen)  # runs on the workers' main threads, the only place for it


@contextmanager
def _starting(worker_group: Any) -> Iterator[None]:
    """Where a worker dies meanwhile, Ray Train starts the group again, without counting a failure.

    What fails with all workers alive would fail again. The workers and their resources are released in any case, since
    Ray Train forgets a group that did not start.
    """
    try:
        yield
    except (RayActorError, RayTaskError) as error:
        lost = None
        try:  # a worker that is cut off is known to be dead once Ray has given its node up
            ray.get(worker_group.execute_async(os.getpid), timeout=NODE_SECONDS)
        except RayActorError as death:
            lost = death
        except GetTimeoutError:  # one that waits for the others
            pass
        worker_group.abort()
        if lost:
            raise WorkerGroupStartupFailedError(f"a worker died while its group was set up: {lost}") from error
        raise


class ListeningTorchConfig(TorchConfig):
    """Torch's process group, in workers that checkpoint on SIGTERM."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


def use_device(device: str) -> None:
    """Makes DeepSpeed use `device`, too. Raises DeeDSRError where torch cannot use the GPU that Ray gave."""
    os.environ["DS_ACCELERATOR"] = device
    usable_device(device)


def use_interface_of(address: str) -> None:
    """Makes gloo and NCCL of this process use the network interface that has `address`, the one Ray uses on this node.

    By default gloo listens at the address that the host's name resolves to: 127.0.1.1 by Debian's /etc/hosts, 127.0.0.1
    for a name that does not resolve, and no other node can connect. Variables that the user has set stay. Nothing is
    set if no interface has the address, as behind address translation.
    """
    names = [name for name, held in psutil.net_if_addrs().items() if address in (entry.address for entry in held)]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
        # "=": not a prefix. A further address has a label (eth0:1), which NCCL does not know.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=" + names[0].split(":")[0])


class RestartingTrainer(TorchTrainer):
    """TorchTrainer whose restarts follow `RestartPolicy`, with a range of workers `ElasticPolicy` too."""

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        progress = self.train_loop_config["progress"]
        settings["failure_policy"] = RestartPolicy(self.run_config.failure_config, progress)
        if self.scaling_config.elasticity_enabled:
            settings["scaling_policy"] = ElasticPolicy(self.scaling_config, progress)
        return super()._initialize_and_run_controller(**settings)


class Asked:
    """Whether this worker should stop, asked once per step: no call waits for an answer.

    `progress`: the driver's actor; only rank 0 asks it.
    """

    def __init__(self, progress: Any, rank: int):
        self.progress, self.rank = progress, rank
        self._answer: Any = None
        self._last = Stop.NO
        self._lock = threading.Lock()  # the loop asks, and while it waits for storage another thread

    def __call__(self) -> Stop:
        with self._lock:
            if self.rank == 0 and self._last is not Stop.END:
                self._answer = self._answer or self.progress.stop.remote()
                if ray.wait([self._answer], timeout=0)[0]:
                    self._last, self._answer = ray.get(self._answer) or self._last, None
        if self._last is Stop.END:
            return Stop.END
        # ray.train.get_preemption_info() is a barrier of all workers; the loop agrees by itself.
        drained = get_train_context().preemption_context.preemption_info is not None
        return Stop.MOVE if self._last or drained else terminated()


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
        # The errors of the others follow from a move: a connection is reset where a peer has ended.
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
    """Reports to `progress` which actor starts the workers, and whether they are running."""

    def __init__(self, progress: Any):
        self.progress = progress
        self._state = ""

    def after_controller_start(self, train_run_context: Any) -> None:
        # `train-...`: as `ScalingPolicy` names itself.
        self.progress.controlled.remote(ray.get_runtime_context().current_actor, f"train-{train_run_context.run_id}")

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        name = current_state._state_type.state_name
        if name != self._state:
            self._state = name
            self.progress.works.remote(name not in _WITHOUT_WORKERS)
        elif name in _WITHOUT_WORKERS:
            time.sleep(_PAUSE)  # an elastic run without its fewest workers asks again at once, with a whole CPU


def _reason(error: TrainingFailedError) -> str:
    """The root cause among the workers' failures, else the last line of the first."""
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    if any(isinstance(getattr(f, "health_check_failure", f), RayActorError) for f in failures):
        return "the process or the node of one is gone"
    text = str(next(iter(failures), error)).strip()
    return text.splitlines()[-1].strip()[:_LONGEST_REASON] if text else type(error).__name__


def train_worker(config: dict[str, Any]) -> str | None:
    """Ray Train's loop of one worker. `config`: `options`, `claim`, `tracking_uri`, `device`, `threads`, `progress`.

    Returns a message for the user where starting the workers again would be of no use.
    """
    torch.set_num_threads(config["threads"])
    options = config["options"]
    for place in (options.data, options.out):
        require_here(place)
    dataset = Dataset.open(options.data)
    stage, out = make_stage(options, dataset), open_storage(options.out)
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

        run = tracking.open_run(
            config["tracking_uri"], claim.run_id, permit=claim.holds, recorded=partial(recorded, out)
        )
    try:
        device = ray.train.torch.get_device() if config["device"] == "cuda" else torch.device("cpu")
        progress = config["progress"]
        report, say = progress.report.remote, progress.say.remote
        Loop(stage, dataset, device, run, report, asked, claim, say).train()
    except (Ended, Untrainable, Unwritable) as end:  # every worker has the same
        return str(end)
    finally:
        if run is not None:
            run.close()
            try:
                claim.check()
                for path, data in record_part(run.logged(), claim.attempt).items():
                    out.write(path, data)
            except Superseded:
                pass
            except DeeDSRError as error:
                logger.warning("metrics since the last checkpoint could not be kept: %s", error)
    return None
