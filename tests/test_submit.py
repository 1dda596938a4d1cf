"""Job files go to a real Ray head over loopback, with the token on."""

import contextlib
import json
import re
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from command_results import differences
from ray_head import ROOT, Head, free_ports, running
from tunnel import Tunnel

from jobs import cli


@pytest.fixture(scope="module")
def head():
    with running(Head(cpus=2)) as head:
        yield head


@pytest.mark.soak
def test_a_shards_job_outlives_ctrl_c_is_followed_again_and_yields_the_digest_of_a_local_run(
    head, photos, small_dataset, small_recipe
):
    recipe = head.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe.model_dump(mode="json")))
    out = head.folder / "dataset"
    # Sources by a path inside the uploaded working directory.
    options = {"source": [str(photos.relative_to(ROOT))], "out": str(out), "recipe": str(recipe)}
    job = {"command": "shards", "name": "shards", "working_dir": str(ROOT), "options": options, "mlflow": "nodes"}
    # Its tasks wait for the CPUs: it must not end between the two commands, however fast the machine is.
    free = head.folder / "free"
    holder = entry(head, f"until [ -e {free} ]; do sleep 0.2; done", entrypoint_num_cpus=2)
    while state(head, holder) == "PENDING":
        time.sleep(0.2)

    with head.start_submit(job, "--wait") as first:
        said = []
        for line in first.stderr:
            said.append(line)
            if line.endswith(" runs\n"):
                break
        else:
            pytest.fail("".join(said) + (head.folder / "head.log").read_text())
        job_id = said[-1].split()[1]
        first.send_signal(signal.SIGINT)
        output, log = first.communicate(timeout=60)
    assert first.returncode == 130, log
    assert output == ""
    assert f"deedsr submit --follow {job_id} --address {head.address}" in log
    assert f"deedsr submit --stop {job_id} --address {head.address}" in log
    assert "Traceback" not in log

    with head.start_submit(job, "--wait") as second:
        said = []
        for line in second.stderr:
            said.append(line)
            if line.endswith(" is the same job and has not ended\n"):
                break
        free.touch()
        output, rest = second.communicate(timeout=240)
    log = "".join([*said, rest])
    assert second.returncode == 0, log
    result = json.loads(output)
    assert differences("submit --wait", result) == []
    assert result["job_id"] == job_id  # not a second one
    assert job_id.startswith("shards-")
    assert result["status"] == "SUCCEEDED"
    local = json.loads(Path(small_dataset, "manifest.json").read_text())
    remote = json.loads((out / "manifest.json").read_text())
    assert remote["digest"] == local["digest"]
    assert remote["digest"] in log  # the job's log was followed to its end
    [uploaded] = (head.folder / "ray" / "session_latest" / "runtime_resources" / "working_dir_files").glob(
        "_ray_pkg_*/"
    )
    assert (uploaded / "pipelines" / "shards" / "plan.py").is_file()
    assert (uploaded / "pipelines" / "reports" / "templates" / "base.html").is_file()
    assert {path.name for path in uploaded.iterdir()}.isdisjoint({"docs", "tests", ".git", ".venv"})
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
    assert log.count("has no manifest.json") == 1
    assert output.count("manifest.json") == 0
    assert not re.search(
        r"gitignore|is now ignored|gcs://|WebSocket|Runtime env is setting up|Running entrypoint", log
    ), log
    assert "Traceback" not in log


@pytest.mark.soak
def test_a_cluster_without_gpu_and_autoscaler_is_refused_at_once_naming_the_option(head, small_dataset):
    options = {"model": "tiny", "data": small_dataset, "out": str(head.folder / "evaluation")}
    job = {"command": "evaluate", "options": options, "working_dir": str(ROOT), "mlflow": "nodes"}
    code, _, log = head.submit(job, "--wait")
    assert code == 1, log
    assert "error: this cluster has no GPU and no autoscaler that could add one: --device cpu" in log
    assert not any((head.folder / "evaluation").iterdir())


def test_without_the_token_nothing_is_accepted(head):
    wrong = head.folder / "wrong"
    wrong.write_text(secrets.token_hex(32))
    code, _, log = head.submit({"command": "verify", "options": {"uri": "s3://b/p"}}, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert code == 1
    assert f"error: the cluster at {head.address} refuses the token of {wrong}" in log
    code, _, log = head.submit({"command": "verify", "options": {"uri": "s3://b/p"}}, HOME=str(head.folder / "ray"))
    assert code == 1
    assert "wants a token and there is none: copy the cluster's to ~/.ray/auth_token" in log
    assert "Traceback" not in log
    wrong.chmod(0o600)
    examined = {}
    for path in (head.environment["RAY_AUTH_TOKEN_PATH"], str(wrong)):
        command = [sys.executable, "-m", "deedsr", "doctor", "--json", "--out", str(head.folder)]
        environment = head.environment | {"RAY_AUTH_TOKEN_PATH": path}
        done = subprocess.run([*command, "--address", head.address], env=environment, capture_output=True, cwd=ROOT)
        examined[path] = done.returncode, json.loads(done.stdout)["broken"]
    assert list(examined.values()) == [(0, []), (1, ["cluster"])]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=5)


def entry(head: Head, command: str, **job) -> str:
    """Submits a shell command as a job, as anybody may; returns its id."""
    job = {"entrypoint": command, "submission_id": f"job-{secrets.token_hex(4)}"} | job
    code = f"from pipelines.dashboard import Dashboard; Dashboard({head.address!r}).submit(**{job!r})"
    subprocess.run([sys.executable, "-c", code], env=head.shell, cwd=ROOT, check=True)
    return job["submission_id"]


def state(head: Head, job_id: str) -> str:
    return head.get(f"/api/jobs/{job_id}")["status"]


@pytest.mark.soak
def test_following_survives_a_tunnel_that_is_cut_and_shows_every_line_once(head):
    flag = head.folder / "flag"
    after = f"until [ -e {flag} ]; do sleep 0.2; done; for i in 4 5 6; do echo line $i.; done"
    job_id = entry(head, f"for i in 1 2 3; do echo line $i.; done; {after}")
    with (
        Tunnel(head.address) as tunnel,
        head.start_submit(None, "--follow", job_id, "--address", tunnel.address) as following,
    ):
        lines = iter(following.stderr)
        next(line for line in lines if line == "line 3.\n")
        tunnel.cut()
        flag.touch()
        next(line for line in lines if f"lost the connection to {tunnel.address}" in line)
        tunnel.mend()
        log, output = "".join(lines), following.stdout.read()
    assert following.returncode == 0, log
    assert json.loads(output)["status"] == "SUCCEEDED"
    assert re.findall(r"^line (\d+)\.$", log, re.MULTILINE) == ["4", "5", "6"]
    assert "connected again" in log
    assert "Traceback" not in log


@pytest.mark.soak
def test_a_connection_that_does_not_come_back_is_exit_3_and_how_to_follow(head):
    job_id = entry(head, "echo line 1.; sleep 600")
    code = "from jobs import cli, following; cli.set_up_process(); following.AWAY_SECONDS = 3; exit(cli.main())"
    with Tunnel(head.address) as tunnel:
        words = ["submit", "--follow", job_id, "--address", tunnel.address]
        with subprocess.Popen(
            [sys.executable, "-c", code, *words], env=head.shell, cwd=ROOT, text=True, stderr=subprocess.PIPE
        ) as following:
            for line in following.stderr:
                if line == "line 1.\n":
                    break
            tunnel.cut()
            log = following.stderr.read()
    assert following.returncode == 3, log
    assert log.splitlines()[-1].startswith("error: no connection to ")
    assert log.splitlines()[-1].endswith(f"deedsr submit --follow {job_id} --address {tunnel.address}")
    assert state(head, job_id) == "RUNNING"
    code, output, log = head.submit(None, "--stop", job_id)
    assert (code, json.loads(output)["status"]) == (0, "STOPPED"), log


@pytest.mark.soak
def test_a_pending_job_says_what_for_is_found_again_by_all_that_it_does_and_can_be_ended(head, photos):
    holder = entry(head, "sleep 600", entrypoint_num_cpus=2)
    folder = head.folder / "code"
    folder.mkdir()
    (folder / "module.py").write_text("one")
    options = {"source": [str(photos)], "out": str(head.folder / "waiting")}
    job = {"command": "shards", "options": options, "working_dir": str(folder), "entrypoint_num_cpus": 1}
    job |= {"mlflow": "nodes"}
    code, output, log = head.submit(job)
    assert code == 0, log
    started = json.loads(output)
    assert started["status"] == "PENDING"
    assert started["follow"] == f"deedsr submit --follow {started['job_id']} --address {head.address}"
    assert started["stop"] == f"deedsr submit --stop {started['job_id']} --address {head.address}"
    code, output, log = head.submit(job)
    assert json.loads(output)["job_id"] == started["job_id"], log

    for change in ({"runtime_env": {"env_vars": {"A": "b"}}}, {"options": options | {"recipe": "light"}}):
        code, _, log = head.submit(job | change)
        assert code == 2, log
        assert f"{started['job_id']} has not ended and has the same out, {options['out']}, with other options" in log
    (folder / "module.py").write_text("two")
    code, _, log = head.submit(job)
    assert code == 2, log
    assert f"end it first: {started['stop']}" in log

    with head.start_submit(None, "--follow", started["job_id"]) as following:
        for line in following.stderr:
            assert " runs" not in line
            if "waiting" in line:
                break
        following.send_signal(signal.SIGINT)
        following.communicate(timeout=60)
    assert re.search(r"is pending, waiting \d+ s for \{CPU 1\}: free: 0 CPU$", line.strip()), line

    code, output, log = head.submit(None, "--stop", started["job_id"])
    assert (code, json.loads(output)["status"]) == (0, "STOPPED"), log
    code, output, log = head.submit(job | {"name": "shards"}, "--set", "recipe=light,heavy")
    assert code == 0, log
    several = json.loads(output)["jobs"]
    assert [each["job_id"].rsplit("-", 3)[0] for each in several] == ["shards-recipe-light", "shards-recipe-heavy"]
    assert started["job_id"] not in [each["job_id"] for each in several]
    for job_id in (*[each["job_id"] for each in several], holder):
        assert head.submit(None, "--stop", job_id)[0] == 0


@pytest.mark.soak
def test_a_head_that_is_started_anew_has_forgotten_the_job_and_submitting_again_is_said(head):
    job_id = entry(head, "sleep 600")
    with head.start_submit(None, "--follow", job_id) as following:
        while not following.stderr.readline().endswith(" runs\n"):
            assert following.poll() is None
        head.stop()
        head.start()
        head.wait_until_ready()
        log = following.stderr.read()
    assert following.returncode == 1, log
    assert "lost the connection" in log
    assert f"error: the cluster at {head.address} knows no job {job_id}; a head that was started anew" in log
    assert "Traceback" not in log


@pytest.mark.soak
def test_a_training_that_is_stopped_has_its_checkpoint_and_its_run_is_killed(head, small_dataset):
    out = head.folder / "stopped"
    train = {"max_steps": 100000, "num_workers": 1, "gpus_per_worker": 0, "checkpoint_every": 100000}
    options = {"preset": "tiny", "data": small_dataset, "out": str(out), "train": train}
    job = {"command": "train learner", "options": options, "working_dir": str(ROOT), "mlflow": "nodes"}
    code, output, log = head.submit(job)
    assert code == 0, log
    job_id = json.loads(output)["job_id"]

    def query(text: str) -> list[tuple]:
        if not (head.folder / "mlflow.db").exists():  # the job makes it, and connecting would
            return []
        with contextlib.closing(sqlite3.connect(head.folder / "mlflow.db")) as store:
            return store.execute(text).fetchall()

    steps = (
        "SELECT step FROM metrics JOIN tags USING (run_uuid) WHERE tags.key = 'deedsr.kind' AND tags.value = 'learner'"
    )
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and not query(f"{steps} AND metrics.step > 5"):
        time.sleep(1)
    assert list(out.glob("checkpoints/*/checkpoint.json")) == []
    code, output, log = head.submit(None, "--stop", job_id)
    assert (code, json.loads(output)["status"]) == (0, "STOPPED"), log
    assert list(out.glob("checkpoints/*/checkpoint.json")), log
    assert query("SELECT status FROM runs JOIN tags USING (run_uuid) WHERE tags.value = 'learner'") == [("KILLED",)]


@pytest.mark.soak
def test_the_documents_own_lines_start_a_head_and_submit_to_it_from_a_fresh_shell(tmp_path, small_dataset):
    def lines_of(page: str) -> list[str]:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
        return [line for language, block in blocks if not language for line in block.splitlines()]

    lines = lines_of("clusters.md")
    [start] = [line for line in lines if "ray start --head" in line]
    [submit] = [line for line in lines if line.startswith("deedsr submit jobs/shards.yaml --address")]
    [ray_submit] = [line for line in lines if "ray job submit" in line]
    words = ("~/.ray", "deedsr submit jobs/shards.yaml")
    kubernetes = "\n".join(line for line in lines_of("kubernetes.md") if any(word in line for word in words))
    assert len(kubernetes.splitlines()) == 4  # the folder, the token, the variables, a job
    verify = tmp_path / "verify.yaml"
    verify.write_text(yaml.safe_dump({"command": "verify", "options": {"uri": small_dataset}}))
    with running(Head(cpus=2, line=start)) as own:
        kubectl = own.folder / "kubectl"
        kubectl.write_text(f"#!/bin/sh\ncat {own.token}\n")
        kubectl.chmod(0o755)
        shell = own.shell | {"PATH": f"{own.folder}:{own.shell['PATH']}", "RAY_API_SERVER_ADDRESS": own.address}
        own_job = f"{ray_submit.partition(' shards ')[0]} verify {small_dataset}"
        without_file = shell | {"HOME": str(tmp_path)}
        for line, variables in ((submit, shell), (own_job, shell), (kubernetes, without_file)):
            line = line.replace("http://127.0.0.1:8265", own.address).replace("jobs/shards.yaml", str(verify))
            done = subprocess.run(["bash", "-c", line], env=variables, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / ".ray" / "deedsr-token").stat().st_mode & 0o777 == 0o600
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{own.address}/api/jobs/", timeout=5)


def test_sigterm_to_the_head_leaves_nothing_behind(head):
    assert head.processes()
    head.stop()
    deadline = time.monotonic() + 30
    while head.processes() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert head.processes() == []


def test_an_address_where_nobody_answers_is_one_clear_error(capsys, monkeypatch):
    monkeypatch.setenv("YOUR_BUCKET", "photos")
    monkeypatch.setenv("YOUR_MLFLOW_HOST", "mlflow.internal")
    [port] = free_ports(1)
    code = cli.main(["submit", str(ROOT / "jobs" / "shards.yaml"), "--address", f"http://127.0.0.1:{port}"])
    assert code == 1
    assert f"no Ray dashboard answers at http://127.0.0.1:{port}" in capsys.readouterr().err
