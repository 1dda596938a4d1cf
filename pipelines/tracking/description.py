"""A run's name, description and tags on MLflow's pages, and the command that makes it again."""

import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipelines import machine
from pipelines.tracking.provenance import COMMIT_TAG, DIRTY_TAG, PARENT_TAG
from pipelines.tracking.search import AT_STEP, BEST, metrics_of, run_place

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

NOTE_TAG = "mlflow.note.content"  # MLflow's own name: the description of a run or an experiment, in Markdown
COMMAND_TAG, SETTINGS_TAG, OWN_NOTE_TAG = "deedsr.command", "deedsr.settings", "deedsr.note"
FOLDER_TAG, PLAN_TAG, JOB_TAG = "deedsr.folder", "deedsr.plan", "deedsr.ray.job"
HOSTS_TAG, GPUS_TAG = "deedsr.hosts", "deedsr.gpus"
SECONDS_TAG, SESSION_TAG = "deedsr.seconds", "deedsr.session"  # of the earlier sessions; the present one's start, in ms
# Options that say where something lies or is computed, not what is made: no part of a name or a comparison.
PLACES = {"data", "out", "source", "pairs", "hr_from", "join", "learner", "experiment", "register_as", "tracking"}
PLACES |= {"workers", "num_workers", "device", "metric_weights", "gc", "force", "cpus_per_worker", "gpus_per_worker"}
PLACES |= {"metrics", "loader_threads", "compute_threads", "cache_gb", "schedule_steps"}
MAX_TAG_CHARACTERS = 8000  # of MLflow's stores
_NAMED, _CHARACTERS = 4, 24  # settings in a run's name, and characters of a value there

KINDS = {
    "shards": "Degradation shards: pairs of HR crops and their degraded LR partners",
    "learner": "Stage 1: the degradation learner, trained by contrast on degradation shards",
    "latents": "Latents and degradation vectors of a dataset, computed once for stage 2",
    "adapter": "Stage 2: the degradation-aware adapter, trained around a frozen diffusion model",
    "evaluation": "Metrics of a model, beside bicubic, on pairs of a dataset",
    "chain": "Shards, learner, latents, adapter and evaluation, made one after the other",
}


@dataclass(frozen=True)
class Origin:
    """The command that begins runs: the words behind `deedsr`, and what was typed about its run.

    settings: those of its options that differ from the preset, without places and hardware.
    """

    command: str
    preset: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    note: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def run_name(self, kind: str, subject: str) -> str:
        """Stage, preset, dataset and the settings that differ."""
        words = [f"{key.rpartition('.')[2]}={_value_text(value)}" for key, value in self.settings.items()]
        more = [f"+{len(words) - _NAMED} more"] if len(words) > _NAMED else []
        return " · ".join(filter(None, [kind, self.preset, subject, " ".join([*words[:_NAMED], *more])]))

    def run_tags(self) -> dict[str, str | None]:
        parts = [f"preset {self.preset}"] if self.preset else []
        parts += [f"{key}={json.dumps(value, default=str)}" for key, value in self.settings.items()]
        return {
            "mlflow.source.name": f"deedsr {self.command}",
            "mlflow.source.type": "JOB" if ray_job() else "LOCAL",
            COMMAND_TAG: self.command,
            SETTINGS_TAG: ", ".join(parts)[:MAX_TAG_CHARACTERS] or None,
            OWN_NOTE_TAG: self.note,
            FOLDER_TAG: os.getcwd(),
            JOB_TAG: ray_job(),
            **self.tags,
        }


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("name", "{...}")
    if isinstance(value, list):
        value = ",".join(map(str, value))
    text = str(value).rstrip("/").rpartition("/")[2]
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 1]}…"


def ray_job() -> str | None:
    """Submission id of the Ray job that this command runs in."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {}).get("job_submission_id")


def machine_tags() -> dict[str, str]:
    """Hosts and GPUs that the work had: of the Ray cluster it is connected to, else of this machine."""
    hosts, gpus = [socket.gethostname()], ""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        nodes = [node for node in ray.nodes() if node["Alive"]]
        hosts = sorted({node["NodeManagerHostname"] for node in nodes})
        resources = [node["Resources"] for node in nodes]
        kinds = {
            name.partition(":")[2] for names in resources for name in names if name.startswith("accelerator_type:")
        }
        if count := int(sum(names.get("GPU", 0) for names in resources)):
            gpus = f"{count} {', '.join(sorted(kinds))}".strip()
    elif count := machine.gpus():
        import torch

        gpus = f"{count} {torch.cuda.get_device_name()}"
    more = f" and {len(hosts) - 8} more" if len(hosts) > 8 else ""
    return {HOSTS_TAG: f"{', '.join(hosts[:8])}{more}"} | ({GPUS_TAG: gpus} if gpus else {})


def active_seconds(run: "StoredRun") -> float | None:
    """Time that a run was worked on, without the pauses between its sessions; None before the end of its first one."""
    info, tags = run.info, run.data.tags
    before = float(tags.get(SECONDS_TAG, 0))
    if info.end_time is None or info.status == "RUNNING":
        return before or None
    return before + max(0.0, info.end_time - int(tags.get(SESSION_TAG, info.start_time))) / 1000


def seconds_so_far(run: "StoredRun") -> float:
    """`active_seconds` of a run that is to be continued, also after a kill: up to the last point that it logged."""
    if run.info.status != "RUNNING":
        return active_seconds(run) or 0.0
    session = int(run.data.tags.get(SESSION_TAG, run.info.start_time))
    last = max((metric.timestamp for metric in run.data._metric_objs), default=session)
    return float(run.data.tags.get(SECONDS_TAG, 0)) + max(0, last - session) / 1000


def repeat_command(run: "StoredRun") -> str | None:
    """The command line that makes the run again, from the configuration that MLflow has of it."""
    if COMMAND_TAG not in run.data.tags:
        return None
    return f"deedsr {run.data.tags[COMMAND_TAG]} --config runs:/{run.info.run_id}/config.yaml --out NEW"


def link(client: "MlflowClient", run_id: str, text: str) -> str:
    """A Markdown link to a run on MLflow's pages; without one where the store has no such run."""
    from mlflow.exceptions import MlflowException

    try:
        return f"[{text} {run_id[:8]}]({run_place(client.get_run(run_id))})"
    except MlflowException:
        return f"{text} {run_id[:8]}"


def describe(client: "MlflowClient", run: "StoredRun") -> str:
    """A run's description, in Markdown: what, on which data, from what, by which command, with which result."""
    tags = run.data.tags
    kind = tags.get("deedsr.kind", "")
    lines = [tags[OWN_NOTE_TAG]] if OWN_NOTE_TAG in tags else []  # MLflow's pages show the first three at once
    inputs = [given.dataset for given in run.inputs.dataset_inputs]
    data = [f"{given.name} (digest `{given.digest[:12]}`)" for given in inputs]
    if not data and kind == "shards":
        data = [str(run.data.params.get("source") or run.data.params.get("hr_from"))]
    lines.append(f"{KINDS.get(kind, kind)}." + (f" **Data**: {', '.join(data)}" if data else ""))
    metrics = metrics_of(run)
    shown = [name for name in metrics if "loss_timestep" not in name and not name.startswith("memory/")]
    if shown:
        steps = {name: f"{AT_STEP}{metrics[name][1]}" for name in shown if name.startswith(BEST)}
        figures = [f"{name} {metrics[name][0]:.5g}{steps.get(name, '')}" for name in shown[:12]]
        lines.append(f"**Result**: {', '.join(figures)}")
    parents = {key.removeprefix(PARENT_TAG): value for key, value in tags.items() if key.startswith(PARENT_TAG)}
    if parents:
        lines.append("**Made from**: " + ", ".join(link(client, value, key) for key, value in parents.items()))
    if SETTINGS_TAG in tags:
        lines.append(f"**Settings that differ**: `{tags[SETTINGS_TAG]}`")
    if commit := tags.get(COMMIT_TAG):
        changed = ", with changes that are not committed" if tags.get(DIRTY_TAG) == "true" else ""
        lines.append(f"**Code**: commit `{commit[:12]}`{changed}")
    ran = [f"{name} {tags[tag]}" for name, tag in (("on", HOSTS_TAG), ("GPUs", GPUS_TAG), ("Ray job", JOB_TAG))
           if tag in tags] + ([tags[PLAN_TAG]] if PLAN_TAG in tags else [])  # fmt: skip
    seconds = active_seconds(run)
    ran = ([f"{timedelta(seconds=round(seconds))} h without pauses"] if seconds else []) + ran
    if ran:
        lines.append(f"**Ran**: {'; '.join(ran)}")
    if command := repeat_command(run):
        lines.append(f"**Again**, in `{tags.get(FOLDER_TAG, '')}`:\n\n    {command}")
    return "\n\n".join(lines)[:MAX_TAG_CHARACTERS]
