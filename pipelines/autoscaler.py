"""What the autoscaler of the connected cluster may add, as far as a driver can find out.

Ray has no call that lists node types. Both of its autoscalers publish a status: version 2 (`ray up`, KubeRay) lists
requests that no node type can hold; version 1 (`ray start --head`) runs on every head, and names its nodes `node_ID`
where it cannot start any. The file that `ray up` puts on the head holds the node types. What is read here is not part
of Ray's documented interface: look here when Ray's pin changes.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from pipelines.placement import Nodes

BOOTSTRAP = "~/ray_bootstrap_config.yaml"  # on the head of a cluster of `ray up`, where its commands run
_STATUS = b"__autoscaling_status"


def growth() -> tuple[Nodes, ...] | None:
    """Nodes that may still be added: () without an autoscaler, None where it is not known."""
    types = _node_types(Path(BOOTSTRAP).expanduser())
    if types is not None:
        return types
    if is_v2():
        return None
    names = (_v1_report() or {}).get("active_nodes")
    return () if names and all(name.startswith("node_") for name in names) else None


def refuses(group: Any) -> bool:
    """Whether nothing that the autoscaler may add would hold a waiting placement group."""
    if not is_v2():
        return growth() == ()
    waiting = _v2_reply().autoscaling_state.infeasible_gang_resource_requests
    return any(request.details.startswith(group.id.hex()) for request in waiting)


def coming() -> str:
    """Nodes that are starting, as text; empty without any."""
    names: list[str] = []
    if is_v2():
        state = _v2_reply().autoscaling_state
        names += [instance.ray_node_type_name for instance in state.pending_instances]
        names += [request.ray_node_type_name for request in state.pending_instance_requests]
    elif report := _v1_report():
        names += list(report["pending_launches"]) + [kind for _, kind, _ in report["pending_nodes"]]
    return f"{', '.join(sorted(set(names)))} starting" if names else ""


def _node_types(path: Path) -> tuple[Nodes, ...] | None:
    """Node types of a cluster file as far as `max_workers` lets more of them start; None where there is none."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(config, dict) or not isinstance(config.get("available_node_types"), dict):
        return None
    there: dict[str, int] = (_v1_report() or {}).get("active_nodes", {}) if not is_v2() else {}
    if is_v2():
        for node in _v2_reply().cluster_resource_state.node_states:
            there[node.ray_node_type_name] = there.get(node.ray_node_type_name, 0) + 1
    found = []
    for name, kind in config["available_node_types"].items():
        most = min(kind.get("max_workers", 0), config.get("max_workers", 0))
        if name == config.get("head_node_type") or most <= there.get(name, 0):
            continue
        resources = kind.get("resources", {})
        found.append(Nodes(resources.get("CPU", 0), resources.get("GPU", 0), most - there.get(name, 0)))
    return tuple(found)


def is_v2() -> bool:
    """Whether the autoscaler reports requests that none of its node types holds."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return is_autoscaler_v2(gcs_client=_gcs())


def _gcs() -> Any:
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=ray.get_runtime_context().gcs_address)


def _v1_report() -> dict[str, Any] | None:
    """None for the first seconds of a cluster."""
    status = _gcs().internal_kv_get(_STATUS, None)
    return json.loads(status).get("autoscaler_report") if status else None


def _v2_reply() -> Any:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(_gcs().get_cluster_status(timeout_s=10))
    return reply
