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
from copy import deepcopy
from pathlib import Path

import jsonschema
import psutil
import pytest
import yaml
from ray_head import BIN, free_ports

from jobs.cli import load
from jobs.job_file import load_job_files

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
JOBS = sorted(set((ROOT / "jobs").glob("*.yaml")) - set((ROOT / "jobs").glob("site*.yaml")))
# Size of the instances: vCPU, GiB, GPUs.
INSTANCES = {
    "m6i.2xlarge": (8, 32, 0), "c6i.4xlarge": (16, 32, 0), "g5.4xlarge": (16, 64, 1), "p4d.24xlarge": (96, 1152, 8),
}  # fmt: skip


def pinned(package: str) -> str:
    """Version of a package in the images, whose Python is 3.11."""
    lock = (ROOT / "requirements" / "py311.txt").read_text()
    return re.search(rf"^{package}==(.+)$", lock, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def aws() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


@pytest.fixture(scope="module")
def aws_with_all_node_types() -> dict:
    """The cluster file after what it says on its node type with eight GPUs: no `# ` in front of these lines."""
    before, name, after = (ROOT / "ray_cluster.yaml").read_text().partition("  # gpu8_worker:\n")
    assert name
    lines = after.splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("  # "))
    part = [line.replace("# ", "", 1) for line in [name.rstrip(), *lines[:end]]]
    text = before + "\n".join([*part, *lines[end:]])
    return yaml.safe_load(text.replace("max_workers: 36", "max_workers: 38"))


@pytest.mark.parametrize("file", ["aws", "aws_with_all_node_types"])
def test_ray_accepts_the_cluster_file_by_its_schema_and_its_validator(file, request):
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = deepcopy(request.getfixturevalue(file))
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))


def test_node_types_have_the_size_of_their_instances_and_one_has_eight_gpus(aws_with_all_node_types):
    text = (ROOT / "ray_cluster.yaml").read_text()
    types = aws_with_all_node_types["available_node_types"]
    for name, kind in types.items():
        instance = kind["node_config"]["InstanceType"]
        cpus, gib, gpus = INSTANCES[instance]
        assert re.search(rf"InstanceType: {instance}  # {cpus} vCPU, {gib} GiB" + f", {gpus} GPU" * bool(gpus), text)
        if name != aws_with_all_node_types["head_node_type"]:
            assert kind["resources"] == {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
            assert kind["node_config"].keys() == types["gpu_worker"]["node_config"].keys()
    assert types["gpu8_worker"]["resources"]["GPU"] == 8
    assert sum(kind.get("max_workers", 0) for kind in types.values()) == aws_with_all_node_types["max_workers"]


def test_every_node_logs_in_to_the_registry_before_it_pulls_the_image(aws):
    [login] = aws["initialization_commands"]  # on the host; setup commands would run in the container
    assert login.endswith("| docker login --username AWS --password-stdin YOUR-REGISTRY")
    assert f"--region {aws['provider']['region']} " in login
    assert {aws["docker"][f"{node}_image"].split("/")[0] for node in ("head", "worker")} == {"YOUR-REGISTRY"}


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


def test_the_documents_start_a_head_that_listens_on_this_machine_alone_and_asks_for_the_token():
    blocks = [block for page in PAGES for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S)]
    heads = [line for block in blocks for line in block.splitlines() if "ray start --head" in line]
    assert heads
    for line in heads:
        assert line.startswith("RAY_AUTH_MODE=token ")
        # As tests/ray_head.py does. Without the first, Ray listens on every interface.
        for flag in ("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--disable-usage-stats"):
            assert flag in line.split()
    made = [block for block in blocks if "ray get-auth-token --generate" in block]
    assert made
    for block in made:
        assert "chmod 600 ~/.ray/auth_token" in block  # Ray makes it 0644
        assert "--generate > /dev/null" in block  # and prints it


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_shipped_job_files_are_valid_with_the_names_of_a_site_and_named_after_themselves(path, monkeypatch):
    for name, value in yaml.safe_load((ROOT / "jobs" / "site.example.yaml").read_text()).items():
        monkeypatch.setenv(name.replace("-", "_"), value)
    job = load_job_files(path)[0]
    assert "YOUR-" not in job.model_dump_json()
    assert job.name == path.stem
    assert job.entrypoint_num_cpus == job.entrypoint_num_gpus == 0  # on the head, which offers nothing to reserve
    assert Path(job.working_dir, "deedsr", "__main__.py").is_file()


def test_there_is_a_job_file_for_each_step_and_for_all_of_them():
    assert [path.stem for path in JOBS] == ["adapter", "chain", "evaluate", "latents", "learner", "shards", "upscale"]


def test_a_slurm_job_is_queued_again_after_its_time_limit_and_not_after_scancel():
    lines = (ROOT / "infra" / "slurm.sbatch").read_text().splitlines()
    options = {line.split()[1] for line in lines if line.startswith("#SBATCH")}
    assert "--requeue" in options
    assert "--signal=B:USR1@120" in options  # not TERM, which scancel sends
    assert subprocess.run(["bash", "-n", ROOT / "infra" / "slurm.sbatch"]).returncode == 0
    page = (ROOT / "docs" / "clusters.md").read_text()
    commands = re.findall(r"^(?:#   )?sbatch .*?infra/slurm\.sbatch (.+)$", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        name, *words = shlex.split(command)
        if name == "train":
            name, words = f"{name} {words[0]}", words[1:]
        load(name)[1].read(words)


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
    [origins] = [word for word in compose["services"]["mlflow"]["command"] if "cors-allowed-origins" in word]
    assert "${MLFLOW_CORS_ALLOWED_ORIGINS:-" in origins  # else the pages are empty behind a proxy
    example = (ROOT / "infra" / "mlflow.env.example").read_text()
    assert "\nMLFLOW_CORS_ALLOWED_ORIGINS=https://YOUR-MLFLOW-HOST\n" in example
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
