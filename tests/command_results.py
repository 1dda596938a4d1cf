"""What `--json` prints of every command: its keys, and the types of their values.

Types as JSON has them; a tuple is a choice, `[x]` a list of such items, `dict` an object with keys of any name.
"""

from typing import Any

NULL = type(None)
_SHARDS = {
    "manifest": str,
    "digest": str,
    "samples": int,
    "shards": int,
    "written": int,
    "reused": int,
    "rejected": int,
    "validation": int,
    "seconds": float,
    "start_up_seconds": float,
    "samples_per_second": float,
    "run_id": str,  # without `--tracking false`
}
_REMOVED = {"removed_objects": int, "removed_bytes": int, "removed_uploads": int}
_TRAINING = {"run_id": str, "checkpoint": str, "step": int, "loss": float, "samples_seen": int}
_NUMBER = (float, NULL)
_FIGURE = {"mean": _NUMBER, "low": _NUMBER, "high": _NUMBER}
_FIGURES = {"psnr": _FIGURE, "ssim": _FIGURE, "niqe": _FIGURE}
_METRICS = {"model": _FIGURES, "bicubic": _FIGURES}
_DIFFERENCE = {"metric": str, "method": str, "other": str, "mean": float, "low": float, "high": float, "wins": _NUMBER}
_EVALUATION = {
    "metrics": _METRICS,
    "differences": [_DIFFERENCE],
    "rejected": dict,
    "run_id": str,
    "samples": int,
    "results": str,
    "dataset_digest": str,
}

_RUN = {
    "run_id": str,
    "name": str,
    "experiment": str,
    "status": str,
    "started": str,
    "seconds": (float, NULL),
    "dataset_digest": (str, NULL),
    "commit": (str, NULL),
    "metrics": dict,
    "link": str,
}

RESULTS: dict[str, Any] = {
    "chain": {
        "run_id": (str, NULL),
        "skipped": [str],
        "shards": _SHARDS,
        "learner": _TRAINING,
        "latents": _SHARDS,
        "adapter": _TRAINING,
        "evaluate": _EVALUATION,
    },
    "demo": {
        "report": str,
        "shards": str,
        "learner": str,
        "adapter": str,
        "evaluation": {"demo": _METRICS, "tiny": _METRICS},
        "pictures": str,
        "tracking": str,
        "seconds": float,
    },
    "shards": _SHARDS,
    "shards --plan": {
        "sources": int,
        "shards": int,
        "shards_to_make": int,
        "samples": int,
        "samples_error": int,
        "read_bytes": int,
        "written_bytes": int,
        "probed_sources": int,
        "samples_per_second": float,
        "cores": int,
        "nodes": int,
        "hours": float,
        "cost": (float, NULL),
    },
    "shards --source --gc": _SHARDS | _REMOVED,
    "shards --gc": _REMOVED,
    "verify": {"ok": bool, "shards": int, "samples": int, "replayed": int, "problems": [str]},
    "inspect": {"page": str, "samples": int, "shown": int, "rejected": int},
    "latents": _SHARDS,
    "train learner": _TRAINING,
    "train adapter": _TRAINING,
    "evaluate": _EVALUATION,
    "upscale": {
        "images": [{"input": str, "output": str, "seconds": float, "reused": bool}],
        "failed": [{"input": str, "reason": str}],
        "reused": int,
    },
    "export": {"model": str, "bytes": int, "base": (str, NULL)},
    "compare": {
        "runs": [
            _RUN
            | {
                "parents": dict,
                "config": dict,
                "samples_per_second": (float, NULL),
                "steps": dict,
                "against_best": dict,
            }
        ],
        "page": (str, NULL),
    },
    "doctor": {
        "ok": bool,
        "broken": [str],
        "checks": [{"name": str, "found": str, "ok": bool, "remedy": str}],
    },
    "submit": {"job_id": str, "status": str, "address": str, "follow": str, "stop": str},
    "submit --wait": {"job_id": str, "status": str, "address": str},
    "runs list": {"runs": [_RUN]},
    "runs show": _RUN
    | {"description": str, "again": (str, NULL), "config": dict, "tags": dict, "parents": dict, "artifacts": [str]},
    "runs close-stale": {"closed": [str], "left": [str]},
}


def differences(command: str, values: Any) -> list[str]:
    """What is other than recorded in a result: each line names the key."""
    return _differences(values, RESULTS[command], command)


def _differences(value: Any, shape: Any, where: str) -> list[str]:
    if isinstance(shape, tuple):
        return [] if any(not _differences(value, one, where) for one in shape) else [f"{where}: {value!r}"]
    if isinstance(shape, type):
        return [] if type(value) is shape else [f"{where}: {value!r} is no {shape.__name__}"]
    if type(value) is not type(shape):
        return [f"{where}: {value!r} is no {type(shape).__name__}"]
    if isinstance(shape, list):
        return [line for n, item in enumerate(value) for line in _differences(item, shape[0], f"{where}[{n}]")]
    found = [f"{where}: {key} is missing" for key in shape.keys() - value.keys()]
    found += [f"{where}: {key} is new" for key in value.keys() - shape.keys()]
    for key in sorted(shape.keys() & value.keys()):
        found += _differences(value[key], shape[key], f"{where}.{key}")
    return sorted(found)
