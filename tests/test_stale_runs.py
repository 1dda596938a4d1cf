"""Runs whose process was killed are ended as KILLED, and no others."""

import json
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

from jobs import cli
from pipelines import claims, tracking
from pipelines.storage import open_storage
from pipelines.tracking.stale import PROCESS_TAG, USER_TAG, user

ELSEWHERE = {"host": "worker-7", "pid": 1, "processes": "another boot"}


@pytest.fixture
def store(new_store, tmp_path, monkeypatch) -> str:
    uri = new_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def start(out, **tags: str) -> str:
    """A run of another process, which is left RUNNING."""
    options = {"name": "run", "config": {}, "system_metrics": False, "out": str(out), "tags": tags}
    return tracking.start_run("deedsr-shards", **options).id


def of(minutes: float, **process) -> dict[str, str]:
    """The tag of a process whose run began some minutes ago."""
    return {PROCESS_TAG: json.dumps(ELSEWHERE | {"alive": time.time() - 60 * minutes} | process)}


def beat(out, minutes: float, path: str = "_state/runs/a/claim.json", **claim) -> None:
    """A heartbeat of ELSEWHERE in `out`, some minutes old."""
    claim = ELSEWHERE | {"alive": time.time() - 60 * minutes} | claim
    open_storage(str(out)).write(path, json.dumps(claim).encode())


def status(store: str, run_id: str) -> str:
    return MlflowClient(store).get_run(run_id).info.status


def close(capsys, *words: str) -> dict:
    assert cli.main(["runs", "close-stale", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_without_heartbeat_for_ten_minutes_is_ended_and_one_with_is_not(store, tmp_path, capsys):
    outs = {name: tmp_path / name for name in ("dead", "shards", "training", "new", "ended")}
    for out in outs.values():
        out.mkdir()
    beat(outs["dead"], 11)
    beat(outs["shards"], 9)
    beat(outs["training"], 9, "claim.json")
    beat(outs["ended"], 11, "claim.json", ended=True)
    runs = {name: start(out, **of(1 if name == "new" else 60)) for name, out in outs.items()}
    found = close(capsys)
    assert sorted(found["closed"]) == sorted([runs["dead"], runs["ended"]])
    assert {name: status(store, run) for name, run in runs.items()} == {
        "dead": "KILLED", "shards": "RUNNING", "training": "RUNNING", "new": "RUNNING", "ended": "KILLED",
    }  # fmt: skip
    ended = MlflowClient(store).get_run(runs["dead"]).info
    assert ended.end_time < (time.time() - 600) * 1000  # its last heartbeat


def test_only_those_that_are_old_enough(store, tmp_path, capsys):
    run = start(tmp_path, **of(30))
    beat(tmp_path, 30)
    assert close(capsys, "--older", "1h")["closed"] == []
    assert close(capsys, "--older", "20m")["closed"] == [run]
    assert cli.main(["runs", "close-stale", "--older", "soon"]) == 2


def test_those_of_other_users_only_when_asked_for(store, tmp_path, capsys):
    run = start(tmp_path, **of(60), **{USER_TAG: "anna"})
    assert close(capsys) == {"closed": [], "left": [f"{run}: of anna"]}
    assert status(store, run) == "RUNNING"
    assert close(capsys, "--everyone")["closed"] == [run]


def test_one_that_cannot_be_looked_at_is_left_alone(store, tmp_path, capsys):
    run = start(tmp_path / "theirs", **of(60))
    found = close(capsys)
    assert found["closed"] == []
    assert found["left"] == [f"{run}: its out {tmp_path}/theirs is on worker-7"]


def test_the_next_command_on_the_same_out_ends_what_was_killed_there(store, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    died = claims.of_this_process() | {"pid": gone.pid}  # a moment ago, and of this machine, which knows
    killed = start(tmp_path / "here", **{PROCESS_TAG: json.dumps(died)})
    other = start(tmp_path / "there", **{PROCESS_TAG: json.dumps(died)})
    at_work = start(tmp_path / "here")
    assert [status(store, run) for run in (killed, other, at_work)] == ["KILLED", "RUNNING", "RUNNING"]
    start(tmp_path / "here")
    assert status(store, at_work) == "RUNNING"


def test_a_run_says_who_works_for_whom(store, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEDSR_USER", "anna")
    assert MlflowClient(store).get_run(start(tmp_path)).data.tags["mlflow.user"] == "anna"


def test_a_user_without_a_name_is_a_number(monkeypatch):
    for name in ("DEEDSR_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)  # which no system of ours has a name for
    assert user() == "54321"
