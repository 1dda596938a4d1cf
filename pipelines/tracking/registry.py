"""MLflow's model registry: trained models by name and version, with where they came from.

A version refers to the training's --out and copies nothing, so that weights in a private bucket stay there. Only if
the store is a server and --out a local folder, which nobody else could read, the model is uploaded to the run's
artifacts. The SHA-256 of the weights is a tag of the version.

Evaluations write their figures onto the version that they measured. The alias `best` is the best version among those
evaluated alike: on the same samples, with the same sampling settings, by the first of the metrics that were asked for.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deedsr.errors import UsageError
from deedsr.hub.settings import SamplingSettings
from pipelines.storage import Storage, is_hidden, open_storage
from pipelines.storage.transfer import kept
from pipelines.tracking.description import describe, link
from pipelines.tracking.run import Run
from pipelines.tracking.search import higher_is_better
from pipelines.tracking.stale import OUT_TAG
from pipelines.tracking.store import existing_store, masked_uri, quoted, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun
    from mlflow.entities.model_registry import ModelVersion

SCHEME = "models:/"
PARTS = ("adapter", "learner")  # folders of a model
DESCRIPTIONS = ("deedsr.json", "training.json")  # files beside them
WEIGHTS_TAG, LOGGED_TAG = "deedsr.weights", "deedsr.logged_model"  # the latter: id of MLflow's own entry for a model
BEST_ALIAS, BEST_TAG = "best", "deedsr.best"  # the tag: of the registered model, what decides about its alias
EVALUATION_TAG = "deedsr.evaluation."  # of a version; behind it the key of evaluations that are alike

logger = logging.getLogger(__name__)


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
    trained = client.get_run(run.id)
    version = client.create_model_version(
        name,
        source,
        run_id=run.id,
        tags=known_tags | {WEIGHTS_TAG: weights, OUT_TAG: place} | _logged_model(client, trained, name, known_tags),
        description=describe(client, trained),
        await_creation_for=0,
    )
    return str(version.version)


def _logged_model(client: "MlflowClient", run: "StoredRun", name: str, tags: Mapping[str, str]) -> dict[str, str]:
    """The tag with MLflow's own entry for the model, by which its pages lead from an evaluation to the training; none
    where the server is from before there were such entries."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    named = {"name": re.sub(r"\W", "-", name), "source_run_id": run.info.run_id, "model_type": tags.get("deedsr.kind")}
    try:
        model = client.create_logged_model(run.info.experiment_id, tags=dict(tags), **named)
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, int(tags.get("deedsr.step", 0)))])
    except MlflowException as error:
        if error.error_code not in ("ENDPOINT_NOT_FOUND", "NOT_FOUND", "NOT_IMPLEMENTED"):
            raise
        return {}
    return {LOGGED_TAG: model.model_id}


def log_evaluation(run: Run, training: str, folder: Path, results: Mapping[str, Any]) -> None:
    """Write an evaluation's figures onto the versions of the model in `folder`, which the run `training` made.

    The alias `best` of their names goes to the best of the versions that were evaluated alike. Where it was decided by
    other data, settings or another metric, it stays.
    """
    from mlflow.entities import LoggedModelInput

    client, weights = run.client, weights_digest(open_storage(str(folder)))
    versions = client.search_model_versions(f"run_id = {quoted(training)}")
    measured = [version for version in versions if version.tags.get(WEIGHTS_TAG) == weights]
    figures = {name: found["mean"] for name, found in results["metrics"]["model"].items() if found["mean"] is not None}
    decisive = next((name for name in figures if higher_is_better(name) is not None), None)
    if not measured or decisive is None:
        return
    alike = {
        "dataset": results["dataset"]["digest"],
        "split": results["dataset"]["split"],
        "samples": [sample["key"] for sample in results["samples"]],
        "sampling": SamplingSettings.of(results["sampling"]).identity() | {"precision": results["precision"]},
        "seed": results["seed"],
        "metric": {decisive: results["definitions"][decisive]},
    }
    key = hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()[:12]
    part = f"the {alike['split']} split of " if alike["split"] else ""
    about = f"{len(alike['samples'])} samples of {part}dataset {alike['dataset'][:12]}"
    record = {"metric": decisive, "value": figures[decisive], "on": about, "run_id": run.id, "metrics": figures}
    for version in measured:
        client.set_model_version_tag(version.name, version.version, EVALUATION_TAG + key, json.dumps(record))
        for name, value in figures.items():
            client.set_model_version_tag(version.name, version.version, f"deedsr.{name}", f"{value:.5g}")
        text = describe(client, client.get_run(training)) + "\n\n" + _evaluations(client, version)
        client.update_model_version(version.name, version.version, text)
        _move_best(client, version.name, key, about, decisive)
    inputs = [LoggedModelInput(version.tags[LOGGED_TAG]) for version in measured if LOGGED_TAG in version.tags]
    if inputs:
        client.log_inputs(run.id, models=inputs)


def _evaluations(client: "MlflowClient", version: "ModelVersion") -> str:
    """A line of Markdown for each evaluation of a version."""
    tags = client.get_model_version(version.name, version.version).tags
    found = [json.loads(value) for name, value in sorted(tags.items()) if name.startswith(EVALUATION_TAG)]
    return "\n\n".join(
        f"**Evaluated** on {record['on']}: "
        + ", ".join(f"{name} {value:.5g}" for name, value in record["metrics"].items())
        + f" ({link(client, record['run_id'], 'evaluation')})"
        for record in found
    )


def _move_best(client: "MlflowClient", name: str, key: str, about: str, metric: str) -> None:
    model, decided = client.get_registered_model(name), {"key": key, "metric": metric, "on": about}
    before = json.loads(model.tags.get(BEST_TAG, "{}"))
    if BEST_ALIAS in model.aliases and before.get("key") != key:
        how = f"{before['metric']} on {before['on']}" if before else "hand"
        logger.info(
            "models:/%s@%s stays version %s, which was chosen by %s: this evaluation is another one; delete the alias "
            "to have it chosen by evaluations such as this",
            name, BEST_ALIAS, model.aliases[BEST_ALIAS], how,
        )  # fmt: skip
        return
    versions = client.search_model_versions(f"name = {quoted(name)}")
    values = {
        v.version: json.loads(v.tags[EVALUATION_TAG + key])["value"] for v in versions if EVALUATION_TAG + key in v.tags
    }
    best = (max if higher_is_better(metric) else min)(values, key=lambda version: values[version])
    client.set_registered_model_tag(name, BEST_TAG, json.dumps(decided))
    client.set_registered_model_alias(name, BEST_ALIAS, str(best))
    client.update_registered_model(
        name,
        f"`{BEST_ALIAS}` is version {best}: {metric} {values[best]:.5g}, the best of {len(values)} evaluated "
        f"on {about} with equal sampling settings.",
    )
    logger.info("models:/%s@%s is version %s by %s %.5g on %s", name, BEST_ALIAS, best, metric, values[best], about)


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
