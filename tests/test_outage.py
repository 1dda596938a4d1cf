"""A tracking store that dies never stops the work: what is logged waits and is sent once, through kills as well."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow_stores import begin, log
from training_process import WORKER, variants

from deedsr.errors import DeeDSRError, UsageError
from pipelines import tracking
from pipelines.models import Model
from pipelines.storage import open_storage
from pipelines.tracking.registry import register
from pipelines.training import checkpoint
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.launch import finish_run
from pipelines.training.metrics import record_part, recorded


def test_what_is_logged_while_the_store_is_away_is_sent_once_when_it_is_back(store, caplog):
    run = begin(store)
    log(run, 1, 10)
    run.flush()
    store.leave()
    log(run, 11, 20)
    picture = np.full((8, 8, 3), 7, np.uint8)
    run.log_picture("validation/one", picture, step=20)
    with pytest.raises(DeeDSRError, match="did not take what run"):
        run.flush()
    began = time.monotonic()
    log(run, 21, 2020)
    assert [point.step for point in run.logged()] == list(range(1, 2021))
    assert time.monotonic() - began < 2  # neither steps nor checkpoints wait for it
    assert run.logged() == []
    store.come_back()
    assert run.finish()
    assert store.steps(run.id) == list(range(1, 2021))
    assert MlflowClient(store.uri).get_run(run.id).info.status == "FINISHED"
    paths = [item.path for item in MlflowClient(store.uri).list_artifacts(run.id, "pictures/validation")]
    assert paths == ["pictures/validation/one.png"]
    assert sum("kept and sent later" in record.message for record in caplog.records) <= 1


KILLED = """
import os, signal, sys
from functools import partial
from pipelines import tracking
from pipelines.storage import open_storage
from pipelines.training import checkpoint
from pipelines.training.metrics import record_part, recorded
uri, run_id, out, attempt, first, last, die = *sys.argv[1:4], *map(int, sys.argv[4:])
out = open_storage(out)
run = tracking.open_run(uri, run_id, system_metrics=False, recorded=partial(recorded, out))
for step in range(first, last + 1):
    run.log_metrics({"loss": float(step)}, step)
    if step % 10 == 0:
        part = record_part(run.logged(), attempt, step)
        saved = checkpoint.Checkpoint(step, step, 0.5)
        checkpoint.write(out, saved, {part: {} for part in checkpoint.PARTS}, checkpoint.Keep(2), beside=part)
if die:
    os.kill(os.getpid(), signal.SIGKILL)
run.close()
for path, data in record_part(run.logged(), attempt).items():
    out.write(path, data)
"""


@pytest.mark.soak
def test_a_process_killed_while_the_store_is_away_leaves_the_next_one_all_that_was_not_sent(store, tmp_path):
    run = begin(store)
    log(run, 1, 5)
    run.close()
    out = tmp_path / "out"

    def work(*numbers: int) -> int:
        words = [sys.executable, "-c", KILLED, store.uri, run.id, str(out), *map(str, numbers)]
        return subprocess.run(words, cwd=tmp_path, stderr=subprocess.DEVNULL).returncode

    store.leave()
    assert work(1, 6, 35, 1) == -signal.SIGKILL  # its last checkpoint is of step 30
    assert [point.step for point in recorded(open_storage(str(out)))] == list(range(6, 31))
    assert work(2, 31, 45, 0) == 0  # ends with the store still away
    assert [point.step for point in recorded(open_storage(str(out)))] == list(range(6, 46))
    store.come_back()
    assert work(3, 41, 60, 0) == 0  # continues from the checkpoint of step 40
    assert store.steps(run.id) == list(range(1, 61))
    assert [point.step for point in recorded(open_storage(str(out)))] == list(range(6, 61))


def test_points_are_recorded_once_wherever_a_group_of_workers_was_killed(store, tmp_path):
    """Between a part and its checkpoint, behind a part, and behind a batch whose answer was lost."""
    out, run = open_storage(str(tmp_path / "out")), begin(store)

    def group(attempt: int, first: int, last: int, every: int, commits: bool = True) -> tracking.Run:
        writer = tracking.open_run(store.uri, run.id, system_metrics=False, recorded=partial(recorded, out))
        for step in range(first, last + 1):
            writer.log_metrics({"loss": float(step)}, step)
            if step % every == 0:
                writer.log_metrics({"validation/loss": float(step)}, step)
                part = record_part(writer.logged(), attempt, step)
                saved = Checkpoint(step, step, 0.5)
                if commits:
                    checkpoint.write(
                        out, saved, {name: {} for name in checkpoint.PARTS}, checkpoint.Keep(2), beside=part
                    )
                else:
                    for path, data in part.items():
                        out.write(path, data)
        return writer

    group(1, 1, 10, 5).flush()
    store.leave()
    group(2, 11, 20, 10, commits=False)  # killed before the checkpoint of step 20
    group(3, 11, 30, 15)  # continues from step 10, and is killed when nothing of it was sent
    store.come_back()
    last = group(4, 31, 40, 5)
    assert last.close()
    validated = [5, 10, 15, 20, 30, 35, 40]
    assert store.steps(run.id) == list(range(1, 41))
    assert sorted(store.steps(run.id, "validation/loss")) == validated
    points = recorded(out)
    assert sorted(point.step for point in points if point.name == "loss") == list(range(1, 41))
    assert sorted(point.step for point in points if point.name != "loss") == validated
    behind = recorded(out, {"loss": 30, "validation/loss": 30, "system/cpu": 3})
    assert {point.step for point in behind} >= set(range(31, 41))
    assert len(behind) < len(points)
    run.close()


def test_a_run_that_ends_without_its_store_has_its_record_and_the_next_command_sends_it(
    store, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("pipelines.tracking.run.END_SECONDS", 1.0)
    out = open_storage(str(tmp_path / "out"))
    run = begin(store)
    store.leave()
    log(run, 1, 5)
    for path, data in record_part(run.logged(), 1).items():
        out.write(path, data)
    published = []
    assert not finish_run(run, out, lambda: published.append(1))
    assert sum("The same command again sends it" in record.message for record in caplog.records) == 1
    store.come_back()
    monkeypatch.setattr("pipelines.tracking.run.END_SECONDS", 60.0)
    again = tracking.open_run(store.uri, run.id, system_metrics=False)
    assert finish_run(again, out, lambda: published.append(2))
    assert published == [2]
    assert store.steps(run.id) == [1, 2, 3, 4, 5]
    assert MlflowClient(store.uri).get_run(run.id).info.status == "FINISHED"


def test_points_that_an_earlier_version_could_not_send_are_of_the_record(tmp_path):
    """In the checkpoint, as versions before the record kept them, and beside the model where a process had ended."""
    out = open_storage(str(tmp_path))
    out.write("unsent_metrics.jsonl", b'["loss", 0.5, 1, 1]\n["loss", 0.25, 2, 2]\n')
    saved = {
        "step": 2,
        "samples_seen": 8,
        "loss": 0.5,
        "sha256": {},
        "unsent": [["loss", 0.25, 2, 2], ["lr", 1.0, 2, 2]],
    }
    out.write("checkpoints/step-00000002/checkpoint.json", json.dumps(saved).encode())
    assert [(point.name, point.step) for point in recorded(out)] == [("loss", 1), ("loss", 2), ("lr", 2)]


def test_a_continued_run_needs_no_store_to_begin_and_a_new_one_does(store, tmp_path):
    run = begin(store)
    run.close()
    store.leave()
    with pytest.raises(UsageError, match="cannot be used"):
        begin(store)
    again = begin(store, run_id=run.id, tags={"deedsr.kind": "learner"})
    log(again, 1, 3)
    store.come_back()
    assert again.finish()
    assert store.steps(run.id) == [1, 2, 3]
    assert MlflowClient(store.uri).get_run(run.id).data.tags["deedsr.kind"] == "learner"
    with pytest.raises(UsageError, match="has no run missing to continue"):
        begin(store, run_id="missing")


# ---------------------------------------------------------------------------------------------------------------------
# The real thing: a server and a training, both killed


class Server:
    """A real `mlflow server` on an SQLite file."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        words += ["--artifacts-destination", str(self.folder / "artifacts"), "--serve-artifacts"]
        log = (self.folder / "server.log").open("ab")
        # A group of its own: the server's worker processes die with it.
        self.process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, cwd=self.folder)
        wait_for(lambda: self.healthy(), 300)

    def healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


def wait_for(true, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


TRACKED = """
from functools import partial
from pipelines import tracking
from pipelines.training.identity import Claim
from pipelines.training.metrics import record_part, recorded
out = open_storage(sys.argv[4])
run = tracking.open_run(*sys.argv[2:4], system_metrics=False, recorded=partial(recorded, out))
claim = Claim(out, "test")
if not out.exists("claim.json"):
    claim.take()
claim.next_attempt()
"""


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_training_outlives_its_tracking_server_and_its_own_death_without_a_gap_or_a_double(
    server,
    learner_options,
    tmp_path,
):
    out = tmp_path / "out"
    run = tracking.start_run(
        "deedsr-learner", name="run", config={}, tracking_uri=server.uri, system_metrics=False, fault_tolerant=True
    )
    run.close()
    options = variants(learner_options, out, max_steps=400, checkpoint_every=5, keep_checkpoints=2)
    code = WORKER.replace("class Curve", f"from pipelines.storage import open_storage\n{TRACKED}\nclass Curve")
    code = code.replace("curve = Curve()", "curve = run").replace("curves.append(curve)", "")
    # Slow enough for a server to come back in the middle.
    code = code.replace("        return loss(model", "        import time; time.sleep(0.1)\n        return loss(model")
    code = code.replace('torch.device("cpu"), curve)', 'torch.device("cpu"), curve, claim=claim)')
    code += "run.close()\nfor path, data in record_part(run.logged(), claim.attempt).items(): out.write(path, data)\n"
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}

    def training(port: int) -> subprocess.Popen:
        jobs = json.dumps([["learner", asdict(options)]])
        words = [sys.executable, "-c", code, jobs, server.uri, run.id, str(out)]
        return subprocess.Popen(words, env=environment | {"MASTER_PORT": str(port)}, stderr=subprocess.DEVNULL)

    def reached(step: int) -> bool:
        return any(int(p.parent.name[5:]) >= step for p in out.glob("checkpoints/*/checkpoint.json"))

    port = 29000 + os.getpid() % 500
    first = second = training(port)
    try:
        wait_for(lambda: reached(20), 300)
        server.kill()
        wait_for(lambda: reached(60), 300)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert recorded(open_storage(str(out)))
        second = training(port + 1)
        wait_for(lambda: reached(100), 300)
        server.start()
        assert second.wait(240) == 0
    finally:
        for process in (first, second):
            process.kill()
    # What the driver does in the end; on a fast server nothing is left for it.
    assert finish_run(tracking.open_run(server.uri, run.id, system_metrics=False), open_storage(str(out)), list)
    history = MlflowClient(server.uri).get_metric_history(run.id, "loss")
    assert [metric.step for metric in history] == list(range(1, options.train.max_steps + 1))


@pytest.mark.soak
def test_a_server_is_given_the_model_of_a_local_folder_and_gives_it_to_others(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, tiny = tmp_path / "out", Path(str(files("deedsr") / "assets" / "tiny"))
    for part in ("adapter", "learner"):
        shutil.copytree(tiny / part, out / part)
    (out / "deedsr.json").write_text(json.dumps({"format_version": 1, "base": "tiny", "scale": 4}))
    with tracking.start_run("deedsr-adapter", name="adapter", config={}, system_metrics=False) as run:
        assert register(run, "sr", open_storage(str(out)), {}) == "1"
        assert register(run, "sr", open_storage(str(out)), {}) == "1"
    shutil.rmtree(out)
    assert Model.find("models:/sr/latest").name == "models:/sr/1"
    folder = Model.find("models:/sr/1").path
    assert folder == Model.find("models:/sr/1").path
    assert folder.is_relative_to(tmp_path / "cache")
    weights = "adapter/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (tiny / weights).read_bytes()
