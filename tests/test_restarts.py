"""Whole `deedsr train` commands on Ray that lose workers, nodes and their driver."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_training import learner_options  # noqa: F401
from training_process import run

from pipelines import tracking
from pipelines.storage import open_storage
from pipelines.training import checkpoint
from pipelines.training.config import LearnerOptions


@pytest.fixture
def store(tmp_path, monkeypatch) -> str:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


class Command:
    """`deedsr train learner` with these options, running."""

    def __init__(self, options: LearnerOptions, **environment: str):
        self.out = Path(options.out)
        self.out.parent.mkdir(exist_ok=True, parents=True)
        config = self.out.parent / "options.json"
        config.write_text(json.dumps(dataclasses.asdict(options)))
        self.log = self.out.parent / "log"
        words = [sys.executable, "-m", "deedsr", "train", "learner", "--config", str(config), "--json"]
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                words, stdout=subprocess.PIPE, stderr=log, env=os.environ | environment, start_new_session=True
            )

    def wait_for_step(self, step: int, seconds: float = 240) -> None:
        """Until a checkpoint of that step or a later one is committed."""
        deadline = time.monotonic() + seconds
        while not (done := checkpoint.committed(open_storage(str(self.out)))) or done[-1].step < step:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def workers(self, among: psutil.Process | None = None) -> list[psutil.Process]:
        found = []
        for process in (among or self.process).children(recursive=True):
            try:
                if process.cmdline() and process.cmdline()[0].startswith("ray::RayTrainWorker"):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def result(self) -> dict:
        said = self.process.communicate(timeout=600)[0]
        assert self.process.returncode == 0, self.log.read_text()[-3000:]
        return json.loads(said)


def newest(out: Path) -> int:
    done = checkpoint.committed(open_storage(str(out)))
    return done[-1].step if done else 0


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_a_training_that_loses_workers_and_its_driver_ends_as_an_undisturbed_one(
    learner_options, store, tmp_path  # noqa: F811
):  # fmt: skip
    """SIGKILL, SIGTERM and SIGSTOP to a worker: it goes on by itself. SIGTERM and SIGKILL to the driver: by the same
    command. In the end weights and curve are those of two workers that nothing happened to, without Ray, bit for bit.
    """
    train = dataclasses.replace(learner_options.train, max_steps=260, checkpoint_every=20, num_workers=2,
                                micro_batch_size=4, hang_seconds=10.0, keep_checkpoints=3)  # fmt: skip
    options = dataclasses.replace(learner_options, out=str(tmp_path / "run" / "learner"), train=train)
    command = Command(options)
    seconds = {}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
        command.wait_for_step(newest(command.out) + 20)
        victims = command.workers()
        assert len(victims) == 2, command.log.read_text()[-3000:]
        before, began = newest(command.out), time.monotonic()
        victims[1].send_signal(number)
        command.wait_for_step(before + 40)
        seconds[number.name] = time.monotonic() - began
        assert not victims[1].is_running() or victims[1].status() == psutil.STATUS_ZOMBIE
    print("seconds to two checkpoints later:", seconds)

    command.process.send_signal(signal.SIGTERM)
    command.process.communicate(timeout=120)
    assert command.process.returncode == 130
    at = newest(command.out)
    assert at % 20, "it checkpointed where it was"
    command = Command(options)
    command.wait_for_step(at + 20)
    command.process.kill()
    command.process.communicate()
    result = Command(options).result()
    assert result["step"] == 260

    undisturbed = run(dataclasses.replace(options, out=str(tmp_path / "undisturbed")), 2)
    last = [checkpoint.committed(open_storage(str(out)))[-1] for out in (command.out, undisturbed.folder)]
    assert last[0].sha256 == last[1].sha256
    history = tracking.connect(store).get_metric_history(result["run_id"], "loss")
    assert sorted((m.step, m.value) for m in history) == [(s, v) for s, v in undisturbed.curve()]


@pytest.fixture
def three_nodes():
    """A cluster whose head computes nothing, and three nodes of one CPU."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(3)]
    yield cluster, nodes
    cluster.shutdown()


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_a_lost_node_costs_its_worker_until_it_returns(learner_options, store, three_nodes, tmp_path):  # noqa: F811
    """And one that Ray is told to drain is left with a checkpoint of the step at hand, before it is gone."""
    cluster, nodes = three_nodes
    train = dataclasses.replace(learner_options.train, max_steps=1_000_000, checkpoint_every=20, num_workers="1..3",
                                global_batch_size=12, micro_batch_size=2, keep_checkpoints=1000)  # fmt: skip
    contrast = dataclasses.replace(learner_options.contrast, batch_block=2)
    out = str(tmp_path / "run" / "learner")
    command = Command(dataclasses.replace(learner_options, out=out, train=train, contrast=contrast),
                      RAY_ADDRESS=cluster.address)  # fmt: skip

    def seconds_to(workers: int) -> float:
        """Until so many workers have committed a checkpoint."""
        began = time.monotonic()
        while len(command.workers(psutil.Process())) != workers:
            assert time.monotonic() - began < 300, command.log.read_text()[-3000:]
            time.sleep(0.5)
        command.wait_for_step(newest(command.out) + 20)
        return time.monotonic() - began

    started = seconds_to(3)
    cluster.remove_node(nodes[1], allow_graceful=False)
    down = seconds_to(2)
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    up = seconds_to(3)
    words = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address,
             "--node-id", nodes[2].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
             "--deadline-remaining-seconds", "600"]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True)
    seconds_to(2)
    assert any(saved.step % 20 for saved in checkpoint.committed(open_storage(out))), "it checkpointed where it was"
    print(f"seconds: {started:.0f} to the first checkpoint, {down:.0f} after a lost node, {up:.0f} after its return")
    command.process.send_signal(signal.SIGTERM)
    command.process.communicate(timeout=120)
    assert command.process.returncode == 130
    run_id = json.loads((command.out / "training.json").read_text())["run_id"]
    steps = [m.step for m in tracking.connect(store).get_metric_history(run_id, "loss")]
    assert sorted(steps) == list(range(1, newest(command.out) + 1))
