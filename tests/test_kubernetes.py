"""The Kubernetes manifests: KubeRay's fields, Pod Security, and objects that name each other rightly."""

import re
import shlex
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.cli import load
from jobs.job_file import STOP_SECONDS

ROOT = Path(__file__).parent.parent
CLUSTERS = ["raycluster.yaml", "rayjob.yaml"]
SCHEMA = yaml.safe_load((ROOT / "tests" / "kubernetes_schema.yaml").read_text())
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
# CPUs and GiB of the node that the comment in raycluster.yaml names, and what Kubernetes and its daemons keep of it.
NODE, KEPT = (16, 64), (2, 10)
# Volumes of the profile "restricted": none of the node's own files.
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "infra" / name).read_text()))


MANIFESTS = [(path.name, document) for path in sorted((ROOT / "infra").glob("*.yaml"))
             for document in documents(path.name) if "kind" in document]  # fmt: skip
OBJECTS = {(document["kind"], document["metadata"].get("name")): document for _, document in MANIFESTS}


def cluster_spec(name: str) -> dict[str, Any]:
    [manifest] = documents(name)
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def pod_templates(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template of a manifest, with what KubeRay adds: the autoscaler to a head, a pod that submits a job."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Deployment":
        yield "deployment", spec["template"]
    elif manifest["kind"] in ("RayCluster", "RayJob"):
        cluster = spec.get("rayClusterSpec", spec)
        head = deepcopy(cluster["headGroupSpec"]["template"])
        head["spec"]["containers"].append({"name": "autoscaler"} | cluster.get("autoscalerOptions", {}))
        yield "head", head
        yield from ((group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"])
        if manifest["kind"] == "RayJob":
            yield "submitter", spec.get("submitterPodTemplate", {"spec": {"containers": [{"name": "submitter"}]}})
    else:
        assert "containers" not in str(manifest)


def violations(template: dict[str, Any]) -> Iterator[str]:
    """Rules of the Pod Security profile "restricted", and of "baseline" below it, that a pod template breaks."""
    spec = template["spec"]
    pod = spec.get("securityContext", {})
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield key
    if pod.get("sysctls"):
        yield "sysctls"
    for volume in spec.get("volumes", []):
        if set(volume) - {"name"} - VOLUMES:
            yield f"volume {volume['name']}"
    for container in [*spec.get("initContainers", []), *spec.get("ephemeralContainers", []), *spec["containers"]]:
        own = container.get("securityContext", {})
        both = pod | own  # a container's fields win
        if own.get("privileged"):
            yield "privileged"
        if own.get("allowPrivilegeEscalation") is not False:
            yield "allowPrivilegeEscalation"
        if both.get("runAsNonRoot") is not True:
            yield "runAsNonRoot"
        if both.get("runAsUser") == 0:
            yield "runAsUser"
        if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield "seccompProfile"
        capabilities = own.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            yield "capabilities"
        if own.get("procMount", "Default") != "Default":
            yield "procMount"
        if any(port.get("hostPort") for port in container.get("ports", [])):
            yield "hostPort"


TEMPLATES = [pytest.param(template, id=f"{file}-{name}") for file, manifest in MANIFESTS
             for name, template in pod_templates(manifest)]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_pod_templates_meet_the_restricted_profile(template):
    assert list(violations(template)) == []
    for owner in (template["spec"].get("securityContext", {}), template["spec"]["containers"][0]["securityContext"]):
        assert isinstance(owner.get("runAsUser", 1000), int)  # a name cannot be seen not to be root


BREACHES = {
    "hostNetwork": lambda spec: spec.update(hostNetwork=True),
    "sysctls": lambda spec: spec["securityContext"].update(sysctls=[{"name": "kernel.msgmax", "value": "1"}]),
    "volume": lambda spec: spec.setdefault("volumes", []).append({"name": "host", "hostPath": {"path": "/"}}),
    "privileged": lambda spec: spec["containers"][0]["securityContext"].update(privileged=True),
    "allowPrivilegeEscalation": lambda spec: spec["containers"][-1]["securityContext"].pop("allowPrivilegeEscalation"),
    "runAsNonRoot": lambda spec: spec["securityContext"].pop("runAsNonRoot"),
    "runAsUser": lambda spec: spec["containers"][0]["securityContext"].update(runAsUser=0),
    "seccompProfile": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "capabilities": lambda spec: spec["containers"][0]["securityContext"].update(capabilities={"drop": []}),
    "procMount": lambda spec: spec["containers"][0]["securityContext"].update(procMount="Unmasked"),
    "hostPort": lambda spec: spec["containers"][0].update(ports=[{"containerPort": 1, "hostPort": 1}]),
}


@pytest.mark.parametrize("rule", BREACHES)
def test_the_profile_as_stated_here_refuses_what_breaks_it(rule):
    template = deepcopy(TEMPLATES[0].values[0])
    BREACHES[rule](template["spec"])
    assert {found.split()[0] for found in violations(template)} == {rule}


def validate(value: Any, definition: str) -> None:
    jsonschema.validate(value, {"$ref": f"#/definitions/{definition}", "definitions": SCHEMA["definitions"]})


@pytest.mark.parametrize("name", CLUSTERS)
def test_manifests_have_the_fields_of_kuberay(name):
    [manifest] = documents(name)
    validate(manifest, manifest["kind"])
    manifest["spec"]["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        validate(manifest, manifest["kind"])


@pytest.mark.parametrize("template", TEMPLATES)
def test_pod_templates_have_the_fields_of_kubernetes(template):
    validate({**template, "spec": template["spec"] | {"containers": template["spec"]["containers"][:1]}}, "pod")


@pytest.mark.parametrize("name", CLUSTERS)
def test_manifests_describe_a_cluster_that_scales_from_nothing(name):
    spec = cluster_spec(name)
    lock = (ROOT / "requirements" / "py311.txt").read_text()
    assert f"\nray=={spec['rayVersion']}\n" in lock
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["cpu", "gpu"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == 0 < group["maxReplicas"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_worker_fits_the_node_that_the_comment_names_and_gpu_workers_tolerate_its_taint(name):
    comment = re.search(r"nodes of (\d+) vCPU and (\d+) GiB", (ROOT / "infra" / "raycluster.yaml").read_text())
    assert tuple(map(int, comment.groups())) == NODE
    spec = cluster_spec(name)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        [container] = group["template"]["spec"]["containers"]
        requests = container["resources"]["requests"]
        assert requests == container["resources"]["limits"]
        assert float(requests["cpu"]) <= NODE[0] - KEPT[0]
        assert int(requests["memory"].removesuffix("Gi")) <= NODE[1] - KEPT[1]
        gpu = "nvidia.com/gpu" in requests
        assert container["image"] == f"YOUR-REGISTRY/deedsr:{'gpu' if gpu else 'cpu'}"
        taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        assert group["template"]["spec"].get("tolerations", []) == ([taint] if gpu else [])


def test_service_accounts_exist_pull_images_and_may_do_no_more_than_they_need():
    accounts = {name: value for (kind, name), value in OBJECTS.items() if kind == "ServiceAccount"}
    used = {template.values[0]["spec"]["serviceAccountName"] for template in TEMPLATES}
    assert used == set(accounts)  # KubeRay refuses a head whose account does not exist
    assert all(account["imagePullSecrets"] == [{"name": "registry"}] for account in accounts.values())
    assert accounts["deedsr-worker"]["automountServiceAccountToken"] is False
    binding = OBJECTS["RoleBinding", "deedsr-autoscaler"]
    assert [subject["name"] for subject in binding["subjects"]] == ["deedsr-head"]
    rules = OBJECTS[binding["roleRef"]["kind"], binding["roleRef"]["name"]]["rules"]
    allowed = {(*rule["apiGroups"], *rule["resources"]): rule["verbs"] for rule in rules}
    assert allowed["", "pods"] == ["get", "list", "watch", "patch"]
    assert allowed["ray.io", "rayclusters"] == ["get", "patch"]
    for name in CLUSTERS:
        assert cluster_spec(name)["headGroupSpec"]["template"]["spec"]["serviceAccountName"] == "deedsr-head"


def test_all_objects_are_in_the_namespace_and_the_page_names_them_with_their_secrets():
    [namespace] = [name for kind, name in OBJECTS if kind == "Namespace"]
    assert OBJECTS["Namespace", namespace]["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    for file, manifest in MANIFESTS:
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == namespace
        assert f"infra/{file}" in PAGE
        assert f"`{manifest['kind']}`" in PAGE or manifest["kind"] in PAGE
    secrets = set(re.findall(r"secretRef: \{name: ([-a-z0-9]+)", "".join(
        (ROOT / "infra" / file).read_text() for file, _ in MANIFESTS)))  # fmt: skip
    assert secrets == {"s3", "mlflow"}
    for secret in (*secrets, "registry"):
        assert re.search(rf"kubectl create secret \S+ {secret} ", PAGE)


def test_a_job_runs_a_command_that_the_command_line_accepts_once():
    [manifest] = documents("rayjob.yaml")
    spec = manifest["spec"]
    assert spec["entrypointNumCpus"] == 0
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": STOP_SECONDS}  # as `deedsr submit` gives a job
    assert spec["backoffLimit"] == 0  # KubeRay would start a cluster again for what exit code 2 refuses
    for entrypoint in (spec["entrypoint"], *re.findall(r"python -m deedsr .+", PAGE)):
        python, flag, module, command, *words = shlex.split(entrypoint)
        assert [python, flag, module] == ["python", "-m", "deedsr"]
        if command == "train":
            command, words = f"{command} {words[0]}", words[1:]
        load(command)[1].read(words)


def test_the_mlflow_server_answers_to_the_names_that_pods_and_people_call_it_by():
    server = OBJECTS["Deployment", "mlflow"]["spec"]["template"]["spec"]
    [hosts] = [word for word in server["containers"][0]["command"] if word.startswith("--allowed-hosts=")]
    assert {"mlflow:5000", "localhost:5000"} <= set(hosts.partition("=")[2].split(","))
    assert server["enableServiceLinks"] is False
    service = OBJECTS["Service", "mlflow"]["spec"]
    assert service["selector"] == OBJECTS["Deployment", "mlflow"]["spec"]["template"]["metadata"]["labels"]
    assert service["ports"][0]["port"] == server["containers"][0]["ports"][0]["containerPort"] == 5000
    assert "http://mlflow:5000" in PAGE
