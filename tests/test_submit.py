"""Job files go to a real Ray head over loopback, with the token on."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from jobs import cli

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Head:
    """A Ray head as a child process, on loopback, in a temporary directory of its own."""

    def __init__(self):
        # Sockets lie below it, and a socket's path has 107 characters at most: pytest's own folders are too deep.
        self.folder = Path(tempfile.mkdtemp(prefix="dsr", dir="/tmp"))
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        gcs, dashboard, client, agent, agent_grpc, runtime_env, metrics = free_ports(7)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "PATH": f"{BIN}:{os.environ['PATH']}",  # the entry point's `python` is looked up here
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # there are no other nodes to drain to
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db",
        }
        command = [
            BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
            f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--runtime-env-agent-port={runtime_env}", f"--metrics-export-port={metrics}",
            f"--temp-dir={self.folder}/ray", "--num-cpus=2", f"--object-store-memory={200 << 20}",
        ]  # fmt: skip
        self.log = (self.folder / "head.log").open("wb")
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=self.log, stderr=self.log, cwd=self.folder, start_new_session=True
        )

    def wait_until_ready(self) -> None:
        """Until the dashboard knows of a node that can run jobs."""
        deadline = time.monotonic() + 120
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
                return
            time.sleep(0.5)
        raise AssertionError((self.folder / "head.log").read_text())

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.log.close()

    def processes(self) -> list[psutil.Process]:
        """Everything on this machine that runs below the head's folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.folder) in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def start_submit(self, job: dict, *words: str, **environment: str) -> subprocess.Popen:
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        return subprocess.Popen(
            [sys.executable, "-m", "deedsr", "submit", str(path), "--address", self.address, "--json", *words],
            env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            # Tests that a shell runs in the background have SIGINT ignored, and what they start would too.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def submit(self, job: dict, *words: str, **environment: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of `deedsr submit`."""
        with self.start_submit(job, *words, **environment) as process:
            output, log = process.communicate(timeout=240)
        return process.returncode, output, log


@pytest.fixture(scope="module")
def head():
    head = Head()
    try:
        head.wait_until_ready()
        yield head
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            head.stop()
        for process in head.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(head.folder, ignore_errors=True)


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
