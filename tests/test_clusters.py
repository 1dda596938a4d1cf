"""The files that describe clusters and servers are ones that their readers accept."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import jsonschema
import psutil
import pytest
import yaml
from ray_head import BIN, free_ports

from jobs.cli import load
from jobs.job_file import load_job_file

ROOT = Path(__file__).parent.parent
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
MANIFESTS = ["raycluster.yaml", "rayjob.yaml"]


def pinned(package: str) -> str:
    """Version of a package in the images, whose Python is 3.11."""
    lock = (ROOT / "requirements" / "py311.txt").read_text()
    return re.search(rf"^{package}==(.+)$", lock, re.MULTILINE)[1]


def cluster_spec(name: str) -> dict:
    spec = yaml.safe_load((ROOT / "infra" / name).read_text())["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.fixture(scope="module")
def aws() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_ray_accepts_the_cluster_file_by_its_schema_and_its_validator(aws):
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(aws, schema)
    validate_config(prepare_config(aws))


def test_the_cluster_scales_spot_workers_for_data_and_for_training_from_nothing(aws):
    types = dict(aws["available_node_types"])
    head = types.pop(aws["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert sorted(bool(kind["resources"].get("GPU")) for kind in types.values()) == [False, True]
    for kind in types.values():
        assert kind["min_workers"] == 0 < kind["max_workers"]
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(kind["max_workers"] for kind in types.values()) == aws["max_workers"]


def test_whatever_talks_to_a_cluster_must_show_the_token(aws):
    starts = [line for key in ("head", "worker") for line in aws[f"{key}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert all(cluster_spec(name)["authOptions"] == {"mode": "token"} for name in MANIFESTS)


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_manifests_describe_a_cluster_that_scales_from_nothing(name):
    manifest = yaml.safe_load((ROOT / "infra" / name).read_text())
    spec = cluster_spec(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["kind"] == {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}[name]
    assert spec["rayVersion"] == pinned("ray")
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == 0 < group["maxReplicas"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        [container] = group["template"]["spec"]["containers"]
        assert container["image"].startswith("YOUR-REGISTRY/deedsr:")
        gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"].endswith("gpu") == gpu
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_kubernetes_job_runs_a_command_that_the_command_line_accepts():
    spec = yaml.safe_load((ROOT / "infra" / "rayjob.yaml").read_text())["spec"]
    assert spec["entrypointNumCpus"] == 0
    python, flag, module, command, *words = shlex.split(spec["entrypoint"])
    assert [python, flag, module] == ["python", "-m", "deedsr"]
    load(command)[1].read(words)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_shipped_job_files_are_valid_and_named_after_themselves(path):
    job = load_job_file(path)
    assert job.name == path.stem
    assert job.entrypoint_num_cpus == job.entrypoint_num_gpus == 0  # on the head, which offers nothing to reserve
    assert Path(job.working_dir, "deedsr", "__main__.py").is_file()


def test_there_is_a_job_file_for_each_step():
    assert [path.stem for path in JOBS] == ["adapter", "evaluate", "latents", "learner", "shards", "upscale"]


def test_the_mlflow_server_is_the_pinned_one_on_loopback_and_holds_no_secret():
    compose = yaml.safe_load((ROOT / "infra" / "mlflow.compose.yaml").read_text())
    assert compose["services"]["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]
    assert "ports" not in compose["services"]["postgres"]
    dockerfile = (ROOT / "infra" / "mlflow.Dockerfile").read_text()
    assert f"mlflow=={pinned('mlflow')}" in dockerfile
    assert f"boto3=={pinned('boto3')}" in dockerfile
    for service in compose["services"].values():
        secrets = {key: value for key, value in service["environment"].items() if re.search("PASSWORD|SECRET|KEY", key)}
        assert secrets
        assert all(re.fullmatch(r"\$\{\w+(:[-?].*)?\}", value) for value in secrets.values())
    example = (ROOT / "infra" / "mlflow.env.example").read_text()
    assert re.findall(r"^(?:POSTGRES_PASSWORD|AWS_SECRET_ACCESS_KEY)=(.+)$", example, re.MULTILINE) == []


@pytest.fixture
def unit(tmp_path) -> Path:
    """The unit of a node with its paths as they are here."""
    text = (ROOT / "infra" / "ray-node.service").read_text().replace("/opt/deedsr/infra", str(ROOT / "infra"))
    path = tmp_path / "ray-node.service"
    path.write_text(text)
    return path


def test_the_unit_of_a_node_starts_it_again_and_its_command_is_there(unit):
    lines = [line for line in unit.read_text().splitlines() if "=" in line and not line.startswith("#")]
    fields = dict(line.split("=", 1) for line in lines)
    command, *options = fields["ExecStart"].split()
    assert os.access(command, os.X_OK)
    subprocess.run(["sh", "-n", command], check=True)
    assert options == ["$RAY_START_OPTIONS"]
    assert fields["Restart"] == "always"
    assert "RAY_AUTH_MODE=token" in fields["Environment"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not there")
def test_systemd_accepts_the_unit_of_a_node(unit):
    checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.fixture
def short_folder():
    """Ray's sockets lie below it, whose paths must be short."""
    folder = tempfile.mkdtemp(prefix="dsr", dir="/tmp")
    yield folder
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if folder in " ".join(process.cmdline()):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.soak
@pytest.mark.parametrize("ended", ["raylet", "node"])
def test_a_node_ends_with_its_raylet_and_when_it_is_told_to(ended, short_folder):
    [port] = free_ports(1)
    options = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={short_folder}", "--num-cpus=0",
               "--include-dashboard=false", f"--object-store-memory={100 << 20}"]  # fmt: skip
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
    }
    node = psutil.Popen([ROOT / "infra" / "ray-node", *options], env=environment, start_new_session=True)

    def raylets() -> list[psutil.Process]:
        return [process for process in node.children(recursive=True) if process.name() == "raylet"]

    deadline = time.monotonic() + 100
    while not raylets():
        assert node.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.5)
    time.sleep(5)  # it has been seen
    assert node.poll() is None
    (raylets()[0] if ended == "raylet" else node).send_signal(signal.SIGTERM)
    assert node.wait(60) == (1 if ended == "raylet" else 0)
