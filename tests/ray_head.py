"""A Ray head as a child process, on loopback, in a temporary directory of its own."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# By which Ray's fake node provider knows the head.
_HEAD_ID = "f" * 51 + "00000"
_HEAD_TYPE = "ray.head.default"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Head:
    """A head of `cpus` CPUs; with `node_types` it has an autoscaler, which may add nodes of these.

    `node_types`: by name the most nodes and the resources of each, such as `{"gpu": (1, {"CPU": 2, "GPU": 1})}`. Nodes
    are processes of this machine, GPUs are none, and a node ends when it was idle for `idle_seconds`.
    """

    def __init__(
        self,
        cpus: int,
        node_types: Mapping[str, tuple[int, Mapping[str, float]]] | None = None,
        idle_seconds: float = 10,
    ):
        # Sockets lie below it, and a socket's path has 107 characters at most: pytest's own folders are too deep.
        self.folder = Path(tempfile.mkdtemp(prefix="dsr", dir="/tmp"))
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        gcs, dashboard, client, agent, agent_grpc, runtime_env, metrics = free_ports(7)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.gcs_address = f"127.0.0.1:{gcs}"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "PATH": f"{BIN}:{os.environ['PATH']}",  # the entry point's `python` is looked up here
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
            f"--temp-dir={self.folder}/ray", f"--num-cpus={cpus}", "--num-gpus=0",
            f"--object-store-memory={200 << 20}",
        ]  # fmt: skip
        if node_types is not None:
            config = self.folder / "autoscaling.yaml"
            config.write_text(yaml.safe_dump(_autoscaling_config(self.gcs_address, cpus, node_types, idle_seconds)))
            command.append(f"--autoscaling-config={config}")
            self.environment |= {
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "CUDA_VISIBLE_DEVICES": "99",  # one that no machine has: nodes offer it, and torch cannot use it
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_NODE_TYPE_NAME": _HEAD_TYPE,
                "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
            }
        self.log = (self.folder / "head.log").open("wb")
        self.process = subprocess.Popen(
            command, env=self.environment | {"RAY_AUTH_MODE": "token"},  # commands that talk to it do without
            stdout=self.log, stderr=self.log, cwd=self.folder, start_new_session=True,
        )  # fmt: skip

    def get(self, path: str) -> Any:
        """The dashboard's answer as JSON."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(f"{self.address}{path}", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def wait_until_ready(self) -> None:
        """Until the dashboard knows of a node that can run jobs."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.get("/api/jobs/")
                return
            time.sleep(0.5)
        raise AssertionError((self.folder / "head.log").read_text())

    def nodes(self, state: str) -> list[dict[str, float]]:
        """Resources of the nodes beside the head that are `ALIVE`, or that are `DEAD`."""
        nodes = self.get("/api/v0/nodes")["data"]["result"]["result"]
        return [node["resources_total"] for node in nodes if node["state"] == state and not node["is_head_node"]]

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


def _autoscaling_config(
    gcs_address: str, cpus: int, node_types: Mapping[str, tuple[int, Mapping[str, float]]], idle_seconds: float
) -> dict[str, Any]:
    """What `ray start --autoscaling-config` reads."""
    types = {
        name: {"min_workers": 0, "max_workers": most, "resources": dict(resources), "node_config": {}}
        for name, (most, resources) in node_types.items()
    }
    return {
        "cluster_name": "fake",
        "provider": {
            # Ray's `fake_multinode`, by its class: by its name version 2 of the autoscaler looks for defaults in a file
            # that Ray's package lacks.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs_address,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {_HEAD_TYPE: {"resources": {"CPU": cpus}, "max_workers": 0, "node_config": {}}} | types,
        "max_workers": sum(most for most, _ in node_types.values()),
        "idle_timeout_minutes": idle_seconds / 60,
        "upscaling_speed": 10,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{who}setup_commands": [] for who in ("", "head_", "worker_")},
        **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
        "initialization_commands": [],
    }


@contextlib.contextmanager
def running(head: Head) -> Iterator[Head]:
    """The head once it is ready; in the end nothing is left of it, whatever happened."""
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
