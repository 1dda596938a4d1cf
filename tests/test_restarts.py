"""Whole `deedsr train` commands on Ray that lose workers, nodes and their driver."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from fault_proxy import FaultProxy
from training_process import run

from pipelines import tracking
from pipelines.storage import open_storage, publish
from pipelines.training import checkpoint
from pipelines.training.config import LearnerOptions


@pytest.fixture
def store(tmp_path, monkeypatch) -> str:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


class Command:
    """`deedsr train learner` with these options, running. `name`: of its files beside the `--out`."""

    def __init__(self, options: LearnerOptions, name: str = "command", **environment: str):
        self.out = Path(options.out)
        self.out.parent.mkdir(exist_ok=True, parents=True)
        config = self.out.parent / f"{name}.json"
        config.write_text(json.dumps(dataclasses.asdict(options)))
        self.log = self.out.parent / f"{name}.log"
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

    def wait_for_line(self, words: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def result(self) -> dict:
        said = self.process.communicate(timeout=600)[0]
        assert self.process.returncode == 0, self.log.read_text()[-3000:]
        return json.loads(said)


def newest(out: Path) -> int:
    done = checkpoint.committed(open_storage(str(out)))
    return done[-1].step if done else 0


@pytest.mark.soak
def test_of_two_commands_with_one_out_one_is_refused_and_the_other_s_result_is_its_own(
    learner_options, store, tmp_path
):  # fmt: skip
    """Two seeds, started together."""
    tracking.connect(store)
    out = str(tmp_path / "run" / "learner")
    train = dataclasses.replace(learner_options.train, max_steps=4, checkpoint_every=2, log_every=1, num_workers=1)
    seeds = [dataclasses.replace(learner_options, out=out, train=dataclasses.replace(train, seed=n)) for n in (0, 1)]
    commands = [Command(options, f"seed-{seed}") for seed, options in enumerate(seeds)]
    said = [command.process.communicate(timeout=280)[0] for command in commands]
    codes = [command.process.returncode for command in commands]
    assert sorted(codes) == [0, 2], [command.log.read_text()[-2000:] for command in commands]
    winner = codes.index(0)
    refusal = commands[1 - winner].log.read_text()
    assert f"is being trained by {socket.gethostname()} (process {commands[winner].process.pid})" in refusal
    result = json.loads(said[winner])
    client = tracking.connect(store)
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert (run.info.run_id, run.info.status, run.data.params["train.seed"]) == (
        result["run_id"],
        "FINISHED",
        str(winner),
    )
    assert [m.step for m in client.get_metric_history(result["run_id"], "loss")] == [1, 2, 3, 4]
    assert {c.run_id for c in checkpoint.committed(open_storage(out))} == {result["run_id"]}
    record = json.loads((Path(out) / "training.json").read_text())
    assert (record["config"]["train"]["seed"], record["exported"]) == (winner, 4)


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_a_training_that_loses_workers_and_its_driver_ends_as_an_undisturbed_one(
    learner_options, store, tmp_path
):  # fmt: skip
    """SIGKILL, SIGTERM and SIGSTOP to a worker, two failures and a move: it goes on by itself. SIGTERM and SIGKILL to
    the driver: by the same command. In the end weights and curve are those of two workers that nothing happened to,
    without Ray, bit for bit.
    """
    train = dataclasses.replace(learner_options.train, max_steps=260, checkpoint_every=20, num_workers=2,
                                micro_batch_size=4, hang_seconds=10.0, keep_checkpoints=3,
                                max_failures=2)  # fmt: skip
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
def test_a_lost_node_costs_its_worker_until_it_returns(learner_options, store, three_nodes, tmp_path):
    """One that returns, and one that Ray is told to drain, cost no step: the workers checkpoint the one at hand before
    there are others. A command that was interrupted at once is followed by the next one without a wait."""
    cluster, nodes = three_nodes
    train = dataclasses.replace(learner_options.train, max_steps=1_000_000, checkpoint_every=20, num_workers="1..3",
                                global_batch_size=12, micro_batch_size=2, keep_checkpoints=1000,
                                gpus_per_worker=0)  # fmt: skip
    contrast = dataclasses.replace(learner_options.contrast, batch_block=2)
    out = str(tmp_path / "run" / "learner")
    options = dataclasses.replace(learner_options, out=out, train=train, contrast=contrast)
    command = Command(options, RAY_ADDRESS=cluster.address)
    at_hand = lambda: sum(bool(saved.step % 20) for saved in checkpoint.committed(open_storage(out)))

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
    assert at_hand() == 1
    words = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address,
             "--node-id", nodes[2].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
             "--deadline-remaining-seconds", "600"]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True)
    seconds_to(2)
    assert at_hand() == 2
    print(f"seconds: {started:.0f} to the first checkpoint, {down:.0f} after a lost node, {up:.0f} after its return")
    for _ in range(2):
        command.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    command.process.communicate(timeout=30)
    assert command.process.returncode == 130
    command = Command(options, "again", RAY_ADDRESS=cluster.address)
    command.wait_for_step(newest(command.out) + 20, seconds=120)
    command.process.send_signal(signal.SIGTERM)
    command.process.communicate(timeout=120)
    assert command.process.returncode == 130
    run_id = json.loads((command.out / "training.json").read_text())["run_id"]
    steps = [m.step for m in tracking.connect(store).get_metric_history(run_id, "loss")]
    assert sorted(steps) == list(range(1, newest(command.out) + 1))


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_training_whose_shards_are_away_says_so_waits_and_ends_when_it_is_told_to(
    learner_options, store, bucket, s3_server, tmp_path
):  # fmt: skip
    away = threading.Event()
    data = f"{bucket}/{tmp_path.name}"
    publish(Path(learner_options.data), data)
    train = dataclasses.replace(learner_options.train, max_steps=1_000_000, checkpoint_every=20, num_workers=2,
                                hang_seconds=10.0, max_failures=0, cache_gb=0.0)  # fmt: skip
    options = dataclasses.replace(learner_options, data=data, out=str(tmp_path / "run" / "learner"), train=train)
    with FaultProxy(s3_server, lambda number: "reset" if away.is_set() else None) as proxy:
        command = Command(options, AWS_ENDPOINT_URL=proxy.endpoint)
        command.wait_for_step(20)
        away.set()
        command.wait_for_line("workers wait for storage")
        time.sleep(30)  # longer than a step may hang
        away.clear()
        command.wait_for_step(newest(command.out) + 40)
        assert "workers failed" not in command.log.read_text()
        away.set()
        time.sleep(15)
        command.process.send_signal(signal.SIGTERM)
        command.process.communicate(timeout=40)
    assert command.process.returncode == 130


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_a_training_that_waits_for_a_node_or_hangs_says_so_and_ends_when_it_is_told_to(
    learner_options, store, tmp_path
):  # fmt: skip
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    train = dataclasses.replace(learner_options.train, max_steps=1_000_000, checkpoint_every=20, num_workers=1,
                                gpus_per_worker=0)  # fmt: skip
    folder = tmp_path / "run"
    options = dataclasses.replace(learner_options, out=str(folder / "learner"), train=train)
    tracking.connect(store)

    def begun(options: LearnerOptions, name: str) -> Command:
        return Command(options, name, RAY_ADDRESS=cluster.address)

    def processes_of_ray_train() -> list[str]:
        found = [p.cmdline() for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
        return [words[0] for words in found if words and words[0].startswith(("ray::Train", "ray::RayTrain"))]

    def assert_ended(command: Command) -> None:
        try:
            command.process.communicate(timeout=30)
        finally:
            print(command.log.read_text()[-3000:])
            if command.process.poll() is None:
                command.process.kill()
        assert command.process.returncode == 130
        assert not list(command.out.glob("_ray-*"))
        assert json.loads((command.out / "claim.json").read_text())["ended"]
        if (command.out / "training.json").exists():
            run_id = json.loads((command.out / "training.json").read_text())["run_id"]
            assert tracking.connect(store).get_run(run_id).info.status == "KILLED"

    try:
        node = cluster.add_node(num_cpus=1, **small)
        command = begun(options, "worker-that-hangs")
        command.wait_for_step(20)

        second = begun(dataclasses.replace(options, out=str(folder / "second")), "before-the-first-start")
        second.wait_for_line("s for 1 x {CPU 1}: free: 0 CPU")
        second.process.send_signal(signal.SIGTERM)
        assert_ended(second)
        assert command.process.poll() is None

        [worker] = command.workers(psutil.Process())
        worker.suspend()
        command.process.send_signal(signal.SIGINT)
        time.sleep(3)
        assert command.process.poll() is None
        command.process.send_signal(signal.SIGINT)
        assert_ended(command)
        time.sleep(3)
        assert not processes_of_ray_train()

        command = begun(options, "lost-node")
        command.wait_for_step(newest(command.out) + 20)
        cluster.remove_node(node, allow_graceful=False)
        command.wait_for_line("workers failed: ")
        command.wait_for_line("s for 1 x {CPU 1}: free: 0 CPU")
        command.process.send_signal(signal.SIGTERM)
        assert_ended(command)
        time.sleep(3)
        assert not processes_of_ray_train()
        assert "Traceback" not in command.log.read_text()
        assert "raylet" not in command.log.read_text()
    finally:
        cluster.shutdown()
