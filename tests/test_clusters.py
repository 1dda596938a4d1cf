"""The files that describe clusters and servers are ones that their readers accept."""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from jobs.cli import load
from jobs.job_file import load_job_file

ROOT = Path(__file__).parent.parent
JOBS = sorted(set((ROOT / "jobs").glob("*.yaml")) - set((ROOT / "jobs").glob("site*.yaml")))
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
def test_shipped_job_files_are_valid_with_the_names_of_a_site_and_named_after_themselves(path, monkeypatch):
    for name, value in yaml.safe_load((ROOT / "jobs" / "site.example.yaml").read_text()).items():
        monkeypatch.setenv(name.replace("-", "_"), value)
    job = load_job_file(path)
    assert "YOUR-" not in job.model_dump_json()
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
