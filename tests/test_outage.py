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
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from test_training import WORKER, learner_options, variants  # noqa: F401

from deedsr.errors import UsageError
from pipelines import tracking
from pipelines.models import pinned, resolve_model
from pipelines.storage import open_storage
from pipelines.tracking.registry import register
from pipelines.training import tracked
from pipelines.training.checkpoint import Checkpoint


class SqliteStore:
    """A store that can be taken away: its file becomes none of a database."""

    def __init__(self, folder: Path):
        self.path = folder / "mlflow.db"
        self.uri = f"sqlite:///{self.path}"

    def leave(self) -> None:
        self.kept = self.path.read_bytes()
        self.path.write_bytes(b"no database")

    def come_back(self) -> None:
        self.path.write_bytes(self.kept)

    def steps(self, run_id: str, name: str = "loss") -> list[int]:
        return [metric.step for metric in MlflowClient(self.uri).get_metric_history(run_id, name)]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    """Making one takes seconds."""
    store = SqliteStore(tmp_path_factory.mktemp("mlflow"))
    tracking.connect(store.uri)
    return store.path


@pytest.fixture
def store(empty_store, tmp_path) -> SqliteStore:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return SqliteStore(tmp_path)


def begin(store, **options) -> tracking.Run:
    options = {"name": "run", "config": {"seed": 1}, "system_metrics": False, "patient": True} | options
    return tracking.start_run("deedsr-learner", tracking_uri=store.uri, **options)


def log(run, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.log_metrics({"loss": float(step)}, step)


def test_what_is_logged_while_the_store_is_away_is_sent_once_when_it_is_back(store, caplog):
    run = begin(store)
    log(run, 1, 10)
    assert run.unsent() == []
    store.leave()
    log(run, 11, 20)
    picture = np.full((8, 8, 3), 7, np.uint8)
    run.log_picture("validation/one", picture, step=20)
    assert [step for _, _, _, step in run.unsent()] == list(range(11, 21))
    began = time.monotonic()
    for step in range(21, 2021):
        log(run, step, step)
        if step % 100 == 0:
            run.unsent()
    assert time.monotonic() - began < 2  # twenty checkpoints do not wait for it
    store.come_back()
    assert run.finish()
    assert run.unsent() == []
    assert store.steps(run.id) == list(range(1, 2021))
    assert MlflowClient(store.uri).get_run(run.id).info.status == "FINISHED"
    paths = [item.path for item in MlflowClient(store.uri).list_artifacts(run.id, "pictures/validation")]
    assert paths == ["pictures/validation/one.png"]
    assert sum("kept and sent later" in record.message for record in caplog.records) == 1


KILLED = """
import os, signal, sys
from pipelines import tracking
from pipelines.storage import open_storage
from pipelines.training import checkpoint, tracked
uri, run_id, out, first, last, die = *sys.argv[1:4], *map(int, sys.argv[4:])
out = open_storage(out)
run = tracking.open_run(uri, run_id, system_metrics=False)
run.take_up(tracked.unsent(out))
for step in range(first, last + 1):
    run.log_metrics({"loss": float(step)}, step)
    if step % 10 == 0:
        saved = checkpoint.Checkpoint(step, step, 0.5, unsent=run.unsent())
        checkpoint.write(out, saved, {part: {} for part in checkpoint.PARTS}, checkpoint.Keep(2))
if die:
    os.kill(os.getpid(), signal.SIGKILL)
if not run.close():
    tracked.keep(out, run.unsent())
"""


@pytest.mark.soak
def test_a_process_killed_while_the_store_is_away_leaves_the_next_one_all_that_was_not_sent(store, tmp_path):
    run = begin(store)
    log(run, 1, 5)
    run.close()
    out = tmp_path / "out"

    def work(first: int, last: int, die: int) -> int:
        words = [sys.executable, "-c", KILLED, store.uri, run.id, str(out), *map(str, (first, last, die))]
        return subprocess.run(words, cwd=tmp_path, stderr=subprocess.DEVNULL).returncode

    store.leave()
    assert work(6, 35, die=1) == -signal.SIGKILL  # its last checkpoint is of step 30
    assert [step for _, _, _, step in tracked.unsent(open_storage(str(out)))] == list(range(6, 31))
    assert work(31, 45, die=0) == 0  # ends with the store still away
    assert [json.loads(line)[3] for line in (out / tracked.UNSENT).read_text().splitlines()] == list(range(6, 46))
    store.come_back()
    assert work(41, 60, die=0) == 0  # continues from the checkpoint of step 40
    assert store.steps(run.id) == list(range(1, 61))


def test_a_run_that_ends_without_its_store_keeps_all_beside_the_model_and_the_next_command_sends_it(
    store, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("pipelines.tracking.run.END_SECONDS", 1.0)
    out = open_storage(str(tmp_path / "out"))
    run = begin(store)
    store.leave()
    log(run, 1, 5)
    published = []
    assert not tracked.conclude(run, out, lambda: published.append(1))
    assert sum("The same command again sends it" in record.message for record in caplog.records) == 1
    store.come_back()
    again = tracking.open_run(store.uri, run.id, system_metrics=False)
    assert tracked.conclude(again, out, lambda: published.append(2))
    assert published == [2]
    assert store.steps(run.id) == [1, 2, 3, 4, 5]
    assert MlflowClient(store.uri).get_run(run.id).info.status == "FINISHED"
    assert not out.exists(tracked.UNSENT)


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


def test_a_checkpoint_written_before_there_was_anything_unsent_is_read():
    assert Checkpoint(**{"step": 1, "samples_seen": 8, "loss": 0.5, "sha256": {}}).unsent == []


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
from pipelines import tracking
from pipelines.training import tracked
run = tracking.open_run(*sys.argv[2:4], system_metrics=False)
out = open_storage(sys.argv[4])
run.take_up(tracked.unsent(out))
"""


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_training_outlives_its_tracking_server_and_its_own_death_without_a_gap_or_a_double(
    server,
    learner_options,  # noqa: F811
    tmp_path,
):
    out = tmp_path / "out"
    run = tracking.start_run(
        "deedsr-learner", name="run", config={}, tracking_uri=server.uri, system_metrics=False, patient=True
    )
    run.close()
    options = variants(learner_options, out, max_steps=400, checkpoint_every=5, keep_checkpoints=2)
    code = WORKER.replace("class Curve", f"from pipelines.storage import open_storage\n{TRACKED}\nclass Curve")
    code = code.replace("curve = Curve()", "curve = run").replace("curves.append(curve)", "")
    # Slow enough for a server to come back in the middle.
    code = code.replace("        return loss(model", "        import time; time.sleep(0.1)\n        return loss(model")
    code += "if not run.close(): tracked.keep(out, run.unsent())\n"
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
        left = tracked.unsent(open_storage(str(out)))
        assert left
        second = training(port + 1)
        wait_for(lambda: reached(100), 300)
        server.start()
        assert second.wait(240) == 0
    finally:
        for process in (first, second):
            process.kill()
    # What the driver does in the end; on a fast server nothing is left for it.
    assert tracked.conclude(tracking.open_run(server.uri, run.id, system_metrics=False), open_storage(str(out)), list)
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
    assert pinned("models:/sr/latest") == "models:/sr/1"
    folder = resolve_model("models:/sr/1")
    assert folder == resolve_model("models:/sr/1")
    assert folder.is_relative_to(tmp_path / "cache")
    weights = "adapter/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (tiny / weights).read_bytes()
