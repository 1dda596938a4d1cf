"""Claims on MLflow runs, each against a real SQLite store."""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from training_process import run_script

from deedsr.errors import DeeDSRError, UsageError
from pipelines import tracking
from pipelines.reports.comparison import compare
from pipelines.tracking import DatasetInput

DIGEST = "0123456789abcdef" * 4
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def store(new_store, tmp_path_factory) -> str:
    """An SQLite store."""
    return new_store(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def own_store(new_store, tmp_path) -> str:
    """A store of one test."""
    return new_store(tmp_path)


@pytest.fixture
def client(store) -> MlflowClient:
    return MlflowClient(store)


def start(store, **options):
    options = {"name": "run", "config": {"seed": 1}, "system_metrics": False} | options
    return tracking.start_run(options.pop("experiment", "deedsr-learner"), tracking_uri=store, **options)


def history(client, run, name):
    return [(m.step, m.value) for m in client.get_metric_history(run.id, name)]


def artifact(client, run, name, folder) -> Path:
    return Path(client.download_artifacts(run.id, name, str(folder)))


def test_a_run_holds_configuration_dataset_parents_versions_and_commit(store, client, tmp_path):
    config = {"train": {"lr": 1e-4, "widths": [64, 128]}, "data": "s3://bucket/set", "long": "x" * 7000, "none": None}
    run = start(
        store,
        config=config,
        dataset=DatasetInput(DIGEST, "s3://bucket/set"),
        parents={"shards": "a" * 32, "learner": None},
        tags={"deedsr.kind": "learner"},
    )
    run.finish()
    stored = client.get_run(run.id)
    params, tags = stored.data.params, stored.data.tags
    assert params["train.lr"] == "0.0001"
    assert params["train.widths"] == "[64, 128]"
    assert params["data"] == "s3://bucket/set"
    assert "config.yaml" in params["long"]
    assert yaml.safe_load(artifact(client, run, "config.yaml", tmp_path).read_text()) == config
    (given,) = stored.inputs.dataset_inputs
    assert DIGEST.startswith(given.dataset.digest)
    assert len(given.dataset.digest) >= 32
    assert json.loads(given.dataset.source) == {"uri": "s3://bucket/set"}
    assert tags["deedsr.dataset.digest"] == DIGEST
    assert tags["deedsr.parent.shards"] == "a" * 32
    assert "deedsr.parent.learner" not in tags
    assert tags["deedsr.kind"] == "learner"
    assert tags["deedsr.version.numpy"] == np.__version__
    assert stored.info.status == "FINISHED"


def test_a_run_holds_the_commit_of_the_checkout(store, client):
    git = ["git", "-C", str(REPOSITORY)]
    tracked = subprocess.run([*git, "ls-files", "pipelines/tracking"], capture_output=True, text=True)
    if not tracked.stdout:
        pytest.skip("the code runs from no git checkout")
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    run = start(store)
    run.finish()
    assert client.get_run(run.id).data.tags["mlflow.source.git.commit"] == head


def test_names_that_are_not_unicode_are_stored(store, client):
    odd = os.fsdecode(b"caf\xe9")
    run = start(store, config={"out": odd, "data": {"source": [odd]}}, tags={"deedsr.out": odd})
    run.finish()
    data = client.get_run(run.id).data
    assert (data.params["out"], data.tags["deedsr.out"]) == ("caf?", "caf?")


def test_many_parameters_are_all_stored(store, client):
    run = start(store, config={"ranges": {f"value{i}": i for i in range(250)}})
    run.finish()
    params = client.get_run(run.id).data.params
    assert {params[f"ranges.value{i}"] for i in range(250)} == {str(i) for i in range(250)}


def test_no_secret_reaches_the_store(own_store, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "kept-from-the-environment")
    with start(
        own_store,
        experiment="deedsr-secrets",
        config={"server": "https://anna:kept-from-configuration@host/x"},
        dataset=DatasetInput(DIGEST, "https://anna:kept-from-dataset@host/data"),
        tags={"deedsr.out": "https://anna:kept-from-tags@host/out"},
    ) as run:
        run.log_metrics({"loss": 1.0}, 1)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"https://***@host" in stored
    assert b"kept-from" not in stored


def test_a_resumed_run_has_no_gap_and_no_doubled_step(store, client):
    def train(run, first, last):
        for step in range(first, last + 1):
            run.log_metrics({"loss": 1000.0 * first + step}, step)
            if step % 10 == 0:
                run.log_metrics({"validation": float(step)}, step)

    def killed(run):
        with run:
            train(run, 1, 63)
            raise RuntimeError("killed")

    run = start(store, experiment="deedsr-resumed")
    with pytest.raises(RuntimeError, match="killed"):
        killed(run)
    assert client.get_run(run.id).info.status == "FAILED"
    with start(store, experiment="deedsr-resumed", run_id=run.id) as resumed:  # from the checkpoint of step 40
        assert client.get_run(run.id).info.status == "RUNNING"
        train(resumed, 41, 100)
    assert resumed.id == run.id
    assert [step for step, _ in history(client, run, "loss")] == list(range(1, 101))
    assert history(client, run, "loss")[62:64] == [(63, 1063.0), (64, 41064.0)]
    assert history(client, run, "validation") == [(step, float(step)) for step in range(10, 101, 10)]
    assert client.get_run(run.id).info.status == "FINISHED"


def test_a_resume_keeps_parameters_and_tells_the_changed_ones(store, client, tmp_path):
    start(store, config={"train": {"lr": 0.1, "max_steps": 10}}).finish("KILLED")
    run_id = tracking.find_run("deedsr-learner", {}, store)
    again = start(store, run_id=run_id, config={"train": {"lr": 0.1, "max_steps": 20, "workers": 2}})
    again.finish()
    stored = client.get_run(run_id).data
    assert (stored.params["train.max_steps"], stored.params["train.workers"]) == ("10", "2")
    assert {k: v for k, v in stored.tags.items() if k.startswith("deedsr.config.")} == {
        "deedsr.config.train.max_steps": "20"
    }
    assert yaml.safe_load(artifact(client, again, "config.yaml", tmp_path).read_text())["train"]["max_steps"] == 20


def test_another_process_writes_a_run_by_uri_and_id(store, client, tmp_path):
    run = start(store)
    code = (
        "import sys\nfrom pipelines import tracking\n"
        "run = tracking.open_run(sys.argv[1], sys.argv[2], system_metrics=False)\n"
        "for step in range(1, 6): run.log_metrics({'loss': step / 2}, step)\n"
        "run.close()\n"
    )
    run_script(code, 1, [store, run.id], tmp_path)
    assert client.get_run(run.id).info.status == "RUNNING"
    run.log_metrics({"loss": 9.0}, 5)  # the driver knows what the worker wrote
    run.log_metrics({"loss": 9.0}, 6)
    run.finish()
    assert history(client, run, "loss") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (5, 2.5), (6, 9.0)]


def test_metrics_wait_for_a_flush_and_a_flush_sends_more_than_one_batch(store, client):
    run = start(store)
    for step in range(1300):
        run.log_metrics({"loss": float(step)}, step)
    run.flush()
    assert len(history(client, run, "loss")) == 1300
    run.finish()


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_what_stops_the_work_is_the_status_of_the_run(store, client, error, status):
    def stopped(run):
        with run:
            run.log_metrics({"loss": 1.0}, 1)
            raise error

    run = start(store)
    with pytest.raises(error):
        stopped(run)
    assert client.get_run(run.id).info.status == status
    assert history(client, run, "loss") == [(1, 1.0)]


def test_a_picture_comes_back_as_it_was(store, client, photos, tmp_path):
    picture = cv2.imread(str(photos / "validation" / "Yellow-Flower.jpg"))[:64, :48, ::-1]
    with start(store) as run:
        run.log_picture("flowers/yellow", picture)
    stored = cv2.imread(str(artifact(client, run, "pictures/flowers/yellow.png", tmp_path)))[..., ::-1]
    assert np.array_equal(stored, picture)


def test_system_metrics_are_sampled_and_continue_after_a_resume(store, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")

    def sampled(expected):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            run.flush()
            steps = [s for s, _ in history(client, run, "system/cpu_utilization_percentage")]
            if len(steps) >= expected:
                return steps
            time.sleep(0.1)
        raise AssertionError("no system metrics within 30 s")

    with start(store, system_metrics=True) as run:
        before = sampled(1)
    with tracking.open_run(store, run.id) as run:
        steps = sampled(len(before) + 3)
    assert len(steps) == len(set(steps))


def test_the_run_that_made_a_dataset_is_found_by_its_digest(store):
    tags = {"deedsr.kind": "shards"}
    old = start(store, experiment="deedsr-shards", dataset=DatasetInput("d" * 64, "shards"), tags=tags)
    old.finish()
    new = start(store, experiment="my-shards", dataset=DatasetInput("d" * 64, "shards"), tags=tags)
    new.finish()
    start(store, dataset=DatasetInput("d" * 64, "shards"), tags={"deedsr.kind": "learner"}).finish()
    wanted = {"deedsr.dataset.digest": "d" * 64, "deedsr.kind": "shards"}
    assert tracking.find_run(None, wanted, store) == new.id
    assert tracking.find_run("deedsr-shards", wanted, store) == old.id
    assert tracking.find_run(None, wanted | {"deedsr.dataset.digest": "e" * 64}, store) is None
    assert tracking.find_run("no-such-experiment", wanted, store) is None


def test_nothing_is_printed(tmp_path, capfd):
    """Nor by the making of a store."""
    with start(f"sqlite:///{tmp_path}/mlflow.db", system_metrics=True) as run:
        run.log_metrics({"loss": 1.0}, 1)
    assert capfd.readouterr() == ("", "")


def test_without_a_setting_the_store_is_a_file_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mine.db")
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/runs/mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking.tracking_uri() == "http://tracking:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UsageError, match=r"MLFLOW_TRACKING_URI=\./mlruns.*sqlite://"):
        tracking.tracking_uri()


@pytest.mark.parametrize("name", ["what? now", "a%20b", "100%", "[x] #1 é"])
def test_a_working_directory_of_any_name_has_its_own_store(store, name, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(store.removeprefix("sqlite:///"), folder / "mlflow.db")
    monkeypatch.chdir(folder)
    uri = tracking.tracking_uri()
    assert tracking.tracking_uri(uri) == uri
    with pytest.raises(UsageError, match="is a file on"):
        tracking.require_shared_store(uri, [{"NodeManagerHostname": "elsewhere", "Alive": True}])
    with start(uri, experiment="deedsr-of-this-folder") as run:
        run.log_metrics({"loss": 1.0}, 1)
        run.log_text("said", "said.txt")
    again = tracking.connect(uri)
    assert again.get_run(run.id).data.metrics == {"loss": 1.0}
    assert artifact(again, run, "said.txt", tmp_path).read_text() == "said"
    assert run.id in json.dumps(compare().runs)
    assert sorted(os.listdir(folder)) == ["mlartifacts", "mlflow.db"]
    assert sorted(os.listdir(tmp_path)) == sorted([name, "said.txt"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"there is no MLflow store at {tmp_path}/mlflow.db"):
        compare()


def test_artifacts_lie_beside_an_sqlite_store(store, client):
    run = start(store)
    run.finish()
    beside = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts" / "deedsr-learner" / run.id
    assert (beside / "artifacts" / "config.yaml").is_file()


def test_the_name_of_an_experiment_makes_no_path(store, client):
    folder = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts"
    for name in ("../../up", "/etc/x", ".."):
        location = client.get_experiment(tracking.store.experiment_id(client, store, name)).artifact_location
        assert location.startswith(f"{folder.as_uri()}/")
        assert ".." not in location.removeprefix(folder.as_uri()).split("/")


def test_a_store_that_does_not_answer_is_one_clear_error_without_its_password(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://anna:secret@127.0.0.1:{probe.getsockname()[1]}"
    for uri in (dead, f"sqlite:///{tmp_path}/file/mlflow.db"):
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI") as caught:
            start(uri)
        assert "secret" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_run_that_is_not_in_the_store_cannot_be_continued(store):
    with pytest.raises(UsageError, match="has no run missing to continue"):
        start(store, run_id="missing")


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_a_deleted_run_is_named_with_the_command_that_restores_it(own_store, what, monkeypatch):
    from mlflow.cli import cli as mlflow_command

    run = start(own_store, experiment=f"deleted {what}")
    run.finish()
    client = MlflowClient(own_store)
    about = client.get_run(run.id).info
    if what == "run":
        client.delete_run(run.id)
        command = f"mlflow runs restore --run-id {run.id}"
    else:
        client.delete_experiment(about.experiment_id)
        command = f"mlflow experiments restore --experiment-id {about.experiment_id}"
    for fault_tolerant in (True, False):
        with pytest.raises(UsageError, match=f"was deleted in {own_store}: .*{command}"):
            start(own_store, run_id=run.id, fault_tolerant=fault_tolerant)
    going_on = tracking.open_run(own_store, run.id, system_metrics=False)  # deleted while a training writes it
    going_on.log_metrics({"loss": 1.0}, 1)
    with pytest.raises(DeeDSRError, match=command):
        going_on.flush()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own_store)
    mlflow_command.main(command.split()[1:], standalone_mode=False)
    start(own_store, run_id=run.id).finish()
    assert going_on.close()
    assert history(client, run, "loss") == [(1, 1.0)]


def test_a_point_that_the_store_will_never_take_holds_up_no_other(store, client, caplog):
    run = tracking.open_run(store, start(store).id, system_metrics=False)
    for step in range(1, 1300):
        run.log_metrics(
            {"loss": float(step), "accuracy|top1": 0.5} if step in (7, 1200) else {"loss": float(step)}, step
        )
    assert run.finish()
    assert [step for step, _ in history(client, run, "loss")] == list(range(1, 1300))
    left_out = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    assert [message.split(" is left out")[0] for message in left_out] == [
        "accuracy|top1 at step 7",
        "accuracy|top1 at step 1200",
    ]


def test_a_store_that_vanishes_is_an_error_that_keeps_what_is_pending(own_store, tmp_path):
    run = start(own_store)
    run.log_metrics({"loss": 1.0}, 1)
    database = tmp_path / "mlflow.db"
    kept = database.read_bytes()
    database.write_bytes(b"no database")
    with pytest.raises(DeeDSRError, match="did not take what run"):
        run.flush()
    database.write_bytes(kept)
    run.finish()
    assert history(MlflowClient(own_store), run, "loss") == [(1, 1.0)]


def test_a_file_store_is_refused_when_another_machine_would_write_it(store, ray_cluster):
    import ray

    here = ray.nodes()
    tracking.require_shared_store(store, here)
    elsewhere = here[0] | {"NodeManagerHostname": "gpu-17"}
    with pytest.raises(UsageError, match="gpu-17.*MLFLOW_TRACKING_URI"):
        tracking.require_shared_store(store, [*here, elsewhere])
    tracking.require_shared_store(store, [*here, elsewhere | {"Alive": False}])
    tracking.require_shared_store("http://tracking:5000", [*here, elsewhere])
