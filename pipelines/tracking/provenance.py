"""What a run records of where it comes from: configuration, dataset, commit, libraries."""

import contextlib
import hashlib
import json
import math
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipelines.tracking.store import masked_uri

DIGEST_TAG = "deedsr.dataset.digest"
PARENT_TAG = "deedsr.parent."
CONFIG_TAG = "deedsr.config."  # value in force of a parameter that a resume changed: MLflow parameters are immutable
VERSION_TAG = "deedsr.version."
COMMIT_TAG, DIRTY_TAG = "mlflow.source.git.commit", "mlflow.source.git.dirty"  # MLflow's own names
_DIRTY = "-dirty"  # behind the commit of code with changes that are not committed

LIBRARIES = ("deedsr", "torch", "diffusers", "ray", "deepspeed", "mlflow", "numpy", "opencv-python-headless")
MAX_PARAM_CHARACTERS = 6000  # limit of MLflow's stores


class HasDigest(Protocol):
    """What a run needs to know of a dataset: an opened `Dataset` or a `DatasetInput`."""

    @property
    def digest(self) -> str: ...
    @property
    def uri(self) -> str: ...


class DatasetInput(NamedTuple):
    """A dataset by its location and its digest, where no opened `Dataset` is at hand."""

    digest: str
    uri: str


def dataset_name(dataset: HasDigest) -> str:
    """Last part of its location, by which MLflow's pages call it."""
    uri = masked_uri(str(dataset.uri))
    return uri.rstrip("/").rsplit("/", 1)[-1] or uri


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists and empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def git_commit(checkout: Path = Path(__file__).resolve().parents[2]) -> str | None:
    """Commit of this project's code in `checkout`, `-dirty` behind it where tracked files were changed since.

    None where the code is not tracked there: an installed package, the folder of another project.
    """
    git = ["git", "-C", str(checkout)]
    try:
        # A virtual environment may lie inside somebody else's checkout: the file itself must be tracked.
        tracked = [*git, "ls-files", "--error-unmatch", "pipelines/tracking/provenance.py"]
        subprocess.run(tracked, check=True, capture_output=True, timeout=10)
        described = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", f"--dirty={_DIRTY}"]
        return subprocess.run(described, check=True, capture_output=True, timeout=10, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit_tags() -> dict[str, str]:
    """The commit of the running code. A job whose upload left `.git` behind has it in `DEEDSR_GIT_COMMIT`."""
    commit = git_commit() or os.environ.get("DEEDSR_GIT_COMMIT")
    return {COMMIT_TAG: commit.removesuffix(_DIRTY), DIRTY_TAG: str(commit.endswith(_DIRTY)).lower()} if commit else {}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide results, of those installed."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain JSON data without credentials in URIs."""
    return json.loads(masked_uri(json.dumps(dict(config), default=str, ensure_ascii=False)))


def param_text(value: Any) -> str:
    """A value as MLflow parameter: JSON, strings bare, whole numbers without a point."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        value = int(value)  # 1.0 and 1 are one configuration
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= MAX_PARAM_CHARACTERS:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()  # two long values differ here when they differ anywhere
    return f"{text[:80]}... (sha256 {digest[:16]}, whole in config.yaml)"
