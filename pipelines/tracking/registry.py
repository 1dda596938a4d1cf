"""MLflow's model registry: trained models by name and version, with where they came from.

A version refers to the training's --out and copies nothing, so that weights in a private bucket stay there. Only where
a server is told of a folder of this machine, which it refuses and nobody else could read, the model goes to the run's
artifacts. The SHA-256 of the weights stands in the version's tags.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deedsr.errors import UsageError
from pipelines.storage import Storage, is_hidden
from pipelines.storage.transfer import kept
from pipelines.tracking.run import Run
from pipelines.tracking.stale import OUT_TAG
from pipelines.tracking.store import existing_store, masked_uri, quoted, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEME = "models:/"
PARTS = ("adapter", "learner")  # folders of a model
DESCRIPTIONS = ("deedsr.json", "training.json")  # files beside them
WEIGHTS_TAG = "deedsr.weights"


class Version(NamedTuple):
    """`source`: where the model lies. `weights`: their digest, None where another program registered it."""

    name: str
    version: str
    source: str
    weights: str | None

    @property
    def uri(self) -> str:
        return f"{SCHEME}{self.name}/{self.version}"


def weights_digest(storage: Storage) -> str:
    """SHA-256 over the names and contents of a model's weights."""
    digest = hashlib.sha256()
    for part in PARTS:
        for entry in storage.list(f"{part}/"):
            if entry.path.endswith(".safetensors") and not is_hidden(entry.path):
                digest.update(entry.path.encode())
                with storage.open(entry.path) as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
    return digest.hexdigest()


def register(run: Run, name: str, out: Storage, tags: Mapping[str, str | None]) -> str:
    """A version of `name` for the model in `out`, which `run` trained; returns its number.

    The same weights at the same place are registered once.
    """
    from mlflow.exceptions import MlflowException

    client, weights, place = run.client, weights_digest(out), masked_uri(out.uri)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in client.search_model_versions(f"name = {quoted(name)}"):
        if (known.tags.get(WEIGHTS_TAG), known.tags.get(OUT_TAG)) == (weights, place):
            return str(known.version)
    source, folder = out.uri, out.local_path("")
    if folder is not None and run.tracking_uri.startswith("http"):
        for part in (*PARTS, *DESCRIPTIONS):
            if (folder / part).exists():
                run.log_artifact(folder / part, f"model/{part}" if part in PARTS else "model")
        source = f"{client.get_run(run.id).info.artifact_uri}/model"
    known_tags = {key: str(value) for key, value in tags.items() if value is not None}
    version = client.create_model_version(
        name, source, run_id=run.id, tags=known_tags | {WEIGHTS_TAG: weights, OUT_TAG: place}, await_creation_for=0
    )
    return str(version.version)


def find(name: str) -> Version:
    """The version that `models:/NAME/VERSION`, `models:/NAME/latest` or `models:/NAME@ALIAS` means.

    Raises UsageError where the store has none, or cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    match = re.fullmatch(r"models:/{1,3}([^/@]+)(?:/([^/@]+)|@([^/@]+))", name)
    if not match:
        raise UsageError(f"a registered model is models:/NAME/VERSION or models:/NAME@ALIAS, got {name}")
    model, version, alias = match.groups()
    uri, client = tracking_uri(), existing_store(name)
    try:
        if alias:
            found = client.get_model_version_by_alias(model, alias)
        elif version == "latest":
            versions = client.search_model_versions(f"name = {quoted(model)}")
            found = max(versions, key=lambda v: int(v.version), default=None)
        else:
            found = client.get_model_version(model, version)
    except MlflowException:
        found = None
    if found is None:
        raise UsageError(f"there is no {name} in the MLflow store {masked_uri(uri)}: {_there(client, model)}")
    return Version(model, str(found.version), found.source, found.tags.get(WEIGHTS_TAG))


def _there(client: "MlflowClient", model: str) -> str:
    """What could have been meant."""
    versions = sorted(int(v.version) for v in client.search_model_versions(f"name = {quoted(model)}"))
    if versions:
        return f"{model} has the versions {', '.join(map(str, versions[-10:]))}"
    names = sorted(m.name for m in client.search_registered_models())
    return (
        f"it has the models {', '.join(names)}" if names else "it has no model; `deedsr train` registers what it made"
    )


def fetch(version: Version) -> Path:
    """A model among MLflow's artifacts, downloaded once by each node (`pipelines.storage.transfer.kept`)."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    uri = tracking_uri()

    def download(folder: Path) -> None:
        got = Path(download_artifacts(artifact_uri=version.source, dst_path=str(folder), tracking_uri=uri))
        for part in [] if got == folder else list(got.iterdir()):  # it comes in a folder of its own
            part.rename(folder / part.name)

    try:
        return kept(hashlib.sha256(repr((uri, version)).encode()).hexdigest(), download)
    except (MlflowException, OSError) as error:
        raise UsageError(f"{version.uri} lies at {masked_uri(version.source)}, which did not give it") from error
