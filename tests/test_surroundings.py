"""Commands where the surroundings are not what they mostly are: no home, a long TMPDIR, a silent cluster, -OO."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deedsr.errors import UsageError
from jobs import cli
from pipelines import cluster, machine
from pipelines.dashboard import Dashboard, Unreachable

CONNECT = """
from jobs import cli
cli.set_up_process()
from pipelines import cluster
cluster.connect()
import ray
print(ray.get(ray.remote(lambda: __import__("pipelines.machine").machine.cache_folder()).remote()))
"""


def python(*words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    return subprocess.run(
        [sys.executable, *words], env=environment | variables, capture_output=True, text=True, timeout=200
    )


@pytest.fixture
def mute():
    """The address of a server that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def nobody() -> str:
    """An address that refuses connections."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_ray_and_caches_work_where_no_home_can_be_written(tmp_path):
    ran = python("-c", CONNECT, HOME="/proc/nobody", TMPDIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == f"{tmp_path}/deedsr-{os.getuid()}"


def test_a_cache_folder_of_another_user_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nobody")
    (tmp_path / f"deedsr-{os.getuid() + 1}").mkdir()
    monkeypatch.setattr("os.getuid", lambda uid=os.getuid(): uid + 1)
    assert machine.cache_folder() != tmp_path / f"deedsr-{os.getuid()}"


def test_a_cluster_that_does_not_answer_is_one_error(mute, nobody, photos, tmp_path):
    words = ["-m", "deedsr", "shards", "--source", str(photos), "--out", str(tmp_path / "out"), "--tracking", "false"]
    with ThreadPoolExecutor() as pool:  # each waits for its seconds
        both = pool.map(lambda address: python(*words, RAY_ADDRESS=address, HOME=str(tmp_path)), (mute, nobody))
        for address, ran in zip((mute, nobody), both, strict=True):
            assert ran.returncode == 2, ran.stderr
            assert f"no Ray cluster answers at RAY_ADDRESS={address}: start it" in ran.stderr


def test_a_dashboard_that_takes_connections_and_says_nothing_is_one_error(mute, capsys, monkeypatch):
    monkeypatch.setenv("YOUR_BUCKET", "photos")
    monkeypatch.setenv("YOUR_MLFLOW_HOST", "mlflow.internal")
    assert cli.main(["submit", "jobs/shards.yaml", "--address", f"http://{mute}"]) == 1
    assert f"no Ray dashboard answers at http://{mute}" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_the_address_of_a_dashboard_that_is_given_is_the_one_that_is_asked(variable, nobody, monkeypatch):
    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        def log_message(self, *words: object) -> None: ...

    monkeypatch.setenv(variable, f"http://{nobody}")
    with HTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(Unreachable, match=f"{address} answers with status 503"):
            Dashboard(address)
        server.shutdown()


def test_an_interpreter_without_docstrings_is_refused_with_the_reason(photos, tmp_path):
    words = ["-m", "deedsr", "shards", "--source", str(photos), "--out", str(tmp_path / "out"), "--tracking", "false"]
    ran = python(*words, PYTHONOPTIMIZE="2", HOME=str(tmp_path))
    assert ran.returncode == 2, ran.stderr
    assert "PYTHONOPTIMIZE=2" in ran.stderr


TEMPORARY = """
import os, sys
import ray
from pipelines import cluster
for folder in sys.argv[1:]:
    os.environ["TMPDIR"] = folder
    cluster.connect()
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    ray.shutdown()
print("started", len(sys.argv) - 1)
"""


@pytest.mark.soak
def test_a_local_cluster_starts_whatever_the_temporary_folder_is_called(tmp_path):
    short = Path(tempfile.mkdtemp(prefix="w? 1%", dir="/tmp"))
    folders = [tmp_path / ("j" * 60), short / "gone", short / "é"]
    for folder in (folders[0], folders[2]):
        folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    command = [sys.executable, "-c", TEMPORARY, *map(str, folders)]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folders[2])
    shutil.rmtree(short)
    assert "started 3" in said.stdout, said.stderr


def test_a_folder_of_ray_s_own_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("j" * 60)))
    with pytest.raises(UsageError, match=r"RAY_TMPDIR is .*jjj: Ray needs a folder whose path is at most \d+ ASCII"):
        cluster._session_folder()
