"""Job files go to a real Ray head over loopback, with the token on."""

import contextlib
import json
import secrets
import signal
import sqlite3
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from command_results import differences
from ray_head import ROOT, Head, free_ports, running

from jobs import cli


@pytest.fixture(scope="module")
def head():
    with running(Head(cpus=2)) as head:
        yield head


def test_a_shards_job_outlives_ctrl_c_is_followed_again_and_yields_the_digest_of_a_local_run(
    head, photos, small_dataset, small_recipe
):
    recipe = head.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe.model_dump(mode="json")))
    out = head.folder / "dataset"
    # Sources by a path inside the uploaded working directory.
    options = {"source": [str(photos.relative_to(ROOT))], "out": str(out), "recipe": str(recipe)}
    job = {"command": "shards", "name": "shards", "working_dir": str(ROOT), "options": options}

    with head.start_submit(job, "--wait") as first:
        said = []
        for line in first.stderr:
            said.append(line)
            if " runs: " in line:
                break
        else:
            pytest.fail("".join(said) + (head.folder / "head.log").read_text())
        job_id = said[-1].split()[1]
        first.send_signal(signal.SIGINT)
        output, log = first.communicate(timeout=60)
    assert first.returncode == 130, log
    assert output == ""
    assert f"ray job stop {job_id} --address {head.address}" in log
    assert "Traceback" not in log

    code, output, log = head.submit(job, "--wait")
    assert code == 0, log
    result = json.loads(output)
    assert differences("submit", result) == []
    assert result["job_id"] == job_id  # not a second one
    assert job_id.startswith("shards-")
    assert result["status"] == "SUCCEEDED"
    local = json.loads(Path(small_dataset, "manifest.json").read_text())
    remote = json.loads((out / "manifest.json").read_text())
    assert remote["digest"] == local["digest"]
    assert remote["digest"] in log  # the job's log was followed to its end
    with contextlib.closing(sqlite3.connect(head.folder / "mlflow.db")) as store:
        tags = dict(store.execute("SELECT key, value FROM tags").fetchall())
        pictures = list((head.folder / "mlartifacts").rglob("pictures/pair-*.png"))
    assert tags["deedsr.kind"] == "shards"
    assert tags["deedsr.dataset.digest"] == remote["digest"]
    assert pictures


def test_a_failed_job_is_exit_1_and_its_own_error_is_in_the_log(head):
    job = {"command": "verify", "options": {"uri": str(head.folder / "nothing")}, "working_dir": str(ROOT)}
    code, output, log = head.submit(job, "--wait")
    assert code == 1, log
    assert json.loads(output)["status"] == "FAILED"
    assert "manifest.json" in log
    assert "Traceback" not in log


def test_a_cluster_without_gpu_and_autoscaler_is_refused_at_once_naming_the_option(head, small_dataset):
    options = {"model": "tiny", "data": small_dataset, "out": str(head.folder / "evaluation")}
    job = {"command": "evaluate", "options": options, "working_dir": str(ROOT)}
    code, _, log = head.submit(job, "--wait")
    assert code == 1, log
    assert "error: this cluster has no GPU and no autoscaler that could add one: --device cpu" in log
    assert not (head.folder / "evaluation").exists()


def test_without_the_token_nothing_is_accepted(head):
    wrong = head.folder / "wrong"
    wrong.write_text(secrets.token_hex(32))
    code, _, log = head.submit({"command": "verify", "options": {"uri": "s3://b/p"}}, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert code == 1
    assert "token" in log
    assert "Traceback" not in log
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=5)


def test_sigterm_to_the_head_leaves_nothing_behind(head):
    assert head.processes()
    head.stop()
    deadline = time.monotonic() + 30
    while head.processes() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert head.processes() == []


def test_an_address_where_nobody_answers_is_one_clear_error(capsys):
    [port] = free_ports(1)
    code = cli.main(["submit", str(ROOT / "jobs" / "shards.yaml"), "--address", f"http://127.0.0.1:{port}"])
    assert code == 1
    assert f"no Ray dashboard answers at http://127.0.0.1:{port}" in capsys.readouterr().err
