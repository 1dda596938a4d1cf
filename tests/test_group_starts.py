"""Groups of workers on real Ray Train that fail while they are set up, or are moved."""

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train.torch.config as ray_torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from pipelines.training import ray_train
from pipelines.training.health import Moved
from pipelines.training.ray_train import ListeningTorchConfig, RestartingTrainer, RestartPolicy
from pipelines.training.supervision import progress_actor


@dataclass
class BrokenStarts(ListeningTorchConfig):
    """Workers do as `kinds` say, one at each start, instead of joining the process group."""

    folder: str = ""
    kinds: tuple[str, ...] = ()

    @property
    def backend_cls(self) -> Any:
        return BrokenBackend


class BrokenBackend(ray_train._Backend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        start = len(list(Path(backend_config.folder).iterdir()))
        (Path(backend_config.folder) / str(start)).touch()
        if start < len(backend_config.kinds):
            worker_group.execute(break_process_group, backend_config.kinds[start])
        super().on_start(worker_group, backend_config)


def break_process_group(kind: str) -> None:
    rank = ray.train.get_context().get_world_rank()
    joined = ray_torch.dist.init_process_group

    def join(**settings: Any) -> None:
        if kind == "one dies" and rank == 0:
            joined(**settings)  # waits for the other
        if kind == "one dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "one is cut off and dies" and rank == 1:
            subprocess.Popen(["sh", "-c", f"sleep 3; kill -9 {os.getpid()}"], start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        raise RuntimeError("connection closed by peer")

    ray_torch.dist.init_process_group = join


def both_sum() -> float:
    import torch

    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return total.item()


def fit(progress: Any, folder: Path, kinds: tuple[str, ...]) -> float:
    (folder / "starts").mkdir()
    trainer = RestartingTrainer(
        lambda config: both_sum(),
        train_loop_config={"progress": progress},
        torch_config=BrokenStarts(backend="gloo", folder=str(folder / "starts"), kinds=kinds),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=0)),
    )
    return trainer.fit().return_value


@pytest.fixture
def progress(ray_cluster):
    with progress_actor() as progress:
        yield progress


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["one dies", "one is cut off and dies"])
def test_a_worker_that_dies_while_its_group_is_set_up_costs_another_start_and_no_failure(progress, tmp_path, kind):
    assert fit(progress, tmp_path, (kind,)) == 2
    assert len(list((tmp_path / "starts").iterdir())) == 2


@pytest.mark.soak
def test_a_group_that_cannot_be_set_up_with_all_workers_alive_is_not_tried_again(progress, tmp_path):
    with pytest.raises(TrainingFailedError, match="connection closed by peer"):
        fit(progress, tmp_path, ("all fail", "all fail"))
    assert len(list((tmp_path / "starts").iterdir())) == 1


def test_planned_moves_cost_none_of_the_failures_and_each_restart_is_one_line(progress):
    moved = WorkerGroupError("", {0: RuntimeError("connection reset"), 1: Moved(40)})
    failed = WorkerGroupError("", {1: RuntimeError("Traceback\n  of many lines\nRuntimeError: out of memory")})
    policy = RestartPolicy(FailureConfig(max_failures=1), progress)
    decisions = [policy.make_decision(error) for error in (moved, moved, failed, moved, failed)]
    assert decisions == [FailureDecision.RETRY] * 4 + [FailureDecision.RAISE]
    lines = ray.get(progress.look.remote())[2]
    assert [index for index, line in enumerate(lines) if "were told to end" in line] == [0, 1, 3]
    assert len(lines) == 4
    assert lines[2] == "workers failed: RuntimeError: out of memory. They are started again from the last checkpoint"
