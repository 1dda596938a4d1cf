"""`deedsr doctor` on a healthy machine, and with one thing after the other broken."""

import json
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from jobs import cli
from pipelines import doctor, machine


@pytest.fixture
def healthy(monkeypatch, tmp_path) -> Path:
    """An environment with nothing wrong: an own store, token and cache."""
    token = tmp_path / "token"
    token.write_text("a-token-that-nobody-may-see")
    token.chmod(0o600)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return tmp_path


def examined(capsys, *words: str) -> tuple[int, dict]:
    code = cli.main(["doctor", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def broken(capsys, *words: str) -> tuple[str, str]:
    """Name and text of the one check that failed."""
    code, result = examined(capsys, *words)
    found = [check for check in result["checks"] if not check["ok"]]
    assert (code, result["ok"], len(found)) == (1, False, 1), found
    assert found[0]["remedy"]
    return found[0]["name"], f"{found[0]['found']} -> {found[0]['remedy']}"


def test_a_healthy_machine_says_where_each_command_runs(healthy, capsys):
    code, result = examined(capsys, "--out", str(healthy / "runs"))
    assert (code, result["broken"]) == (0, [])
    found = {check["name"]: check["found"] for check in result["checks"]}
    assert found["train learner tiny"].startswith("2 workers x 1 CPU, no GPU, gloo, micro-batch 32 x 1")
    assert "write, conditional put, list, delete" in found["storage"]
    assert list((healthy / "runs").glob("*")) == []
    assert cli.main(["doctor", "--out", str(healthy / "runs")]) == 0
    assert capsys.readouterr().out.endswith("nothing is broken\n")


def test_a_bucket_works_and_a_missing_one_is_named_without_the_secret(healthy, bucket, capsys, monkeypatch):
    code, result = examined(capsys, "--out", f"{bucket}/doctor")
    assert code == 0, result["broken"]
    name, said = broken(capsys, "--out", "s3://no-such-bucket-here/doctor")
    assert name == "storage"
    assert "no-such-bucket-here" in said
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in said


def test_a_storage_that_refuses_connections_is_named(healthy, bucket, capsys, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.setattr(doctor, "_STORAGE_SECONDS", 1.0)
    name, said = broken(capsys, "--out", f"{bucket}/doctor")
    assert name == "storage"
    assert said.startswith(f"{bucket}/doctor: write failed -> ")
    assert said.endswith("no connection to the S3 endpoint; check AWS_ENDPOINT_URL")


def test_an_mlflow_store_is_tried_by_a_run_and_a_server_that_is_away_is_named_without_its_password(
    healthy, new_store, capsys, monkeypatch
):
    new_store(healthy)
    _, result = examined(capsys, "--out", str(healthy))
    assert any("a run written and deleted" in check["found"] for check in result["checks"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:a-password@127.0.0.1:9/")
    name, said = broken(capsys, "--out", str(healthy))
    assert name == "MLflow"
    assert "a-password" not in said
    (healthy / "torn.db").write_bytes(b"no database" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{healthy}/torn.db")
    assert broken(capsys, "--out", str(healthy))[0] == "MLflow"


def test_a_token_that_others_may_read_is_said_with_the_remedy(healthy, capsys, monkeypatch):
    folder = Path(tempfile.mkdtemp(prefix="token"))  # below folders that everybody may enter, unlike pytest's own
    token = folder / "token"
    token.write_text("a-token-that-nobody-may-see")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    try:
        assert examined(capsys, "--out", str(healthy))[0] == 0  # the folder is closed
        folder.chmod(0o755)
        name, said = broken(capsys, "--out", str(healthy))
        assert name == "token"
        assert f"chmod 600 {token}" in said
        assert "a-token-that-nobody-may-see" not in said
        token.chmod(stat.S_IRUSR)
        assert examined(capsys, "--out", str(healthy))[0] == 0
    finally:
        shutil.rmtree(folder)


def test_a_token_file_that_is_empty_or_missing_is_named(healthy, capsys, monkeypatch):
    (healthy / "token").write_text("\n")
    name, said = broken(capsys, "--out", str(healthy))
    assert (name, said) == (
        "token",
        f"{healthy}/token is empty -> copy the cluster's token to {healthy}/token",
    )
    (healthy / "token").unlink()
    name, said = broken(capsys, "--out", str(healthy))
    assert name == "token"
    assert said.startswith(f"{healthy}/token: No such file or directory -> copy the cluster's token")


def test_a_full_disk_is_named(healthy, capsys, small_disk):
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    code, result = examined(capsys, "--out", str(small_disk / "runs"))
    assert (code, result["broken"]) == (1, ["results", "storage"])
    found = {check["name"]: check for check in result["checks"]}
    assert found["results"]["found"] == f"0.0 GiB free in {small_disk}/runs"
    assert "free some" in found["results"]["remedy"]
    assert "no space left; free some" in found["storage"]["remedy"]


def test_a_small_shared_memory_and_a_folder_that_is_a_file_are_named(healthy, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_LEAST_SHARED", 1 << 60)
    name, said = broken(capsys, "--out", str(healthy))
    assert name == "shared memory"
    assert "--shm-size" in said
    monkeypatch.undo()
    file = healthy / "file"
    file.write_text("")
    assert cli.main(["doctor", "--out", str(file / "runs")]) == 1
    assert "BROKEN  storage" in capsys.readouterr().out


def test_a_cluster_that_does_not_answer_is_named(healthy, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    name, said = broken(capsys, "--out", str(healthy), "--address", address)
    assert name == "cluster"
    assert said.endswith(f"no Ray dashboard answers at {address}; start the cluster or give --address")


def test_without_the_pipeline_libraries_it_says_what_works_and_what_to_install(healthy, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda module: None)
    code, result = examined(capsys, "--out", str(healthy))
    (found,) = [check for check in result["checks"] if check["name"] == "pipeline"]
    assert code == 0
    assert "only `upscale` and `export` work" in found["remedy"]
    assert "pip install 'deedsr[pipeline]'" in found["remedy"]


def test_a_driver_that_torch_cannot_use_is_an_answer_and_no_traceback(healthy, capsys, monkeypatch):
    def raises() -> int:
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(machine, "gpus", raises)
    name, said = broken(capsys, "--out", str(healthy))
    assert name == "GPUs"
    assert "driver version is insufficient" in said
