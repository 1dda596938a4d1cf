"""The MLflow store: which one is in force, whether it answers, whether every node can write it."""

import contextlib
import logging
import os
import re
import shlex
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from deedsr.errors import UsageError
from pipelines.storage.lock import scratch_folder
from pipelines.tracking.sqlite import StoreAway, prepare, sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENTS = ("deedsr-shards", "deedsr-learner", "deedsr-adapter", "deedsr-evaluation")
_SQLITE = re.compile(r"sqlite(\+pysqlite)?:///")
KIND_TAG, TRAINING = "mlflow.experimentKind", "custom_model_development"  # MLflow's own names
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")


def tracking_uri(uri: str | None = None) -> str:
    """The store in force: `uri`, else `MLFLOW_TRACKING_URI`, else `mlflow.db` in the working directory.

    SQLite paths come back absolute, so that a worker process with another working directory means the same file.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if path := sqlite_path(uri):
        return sqlite_uri(path)
    if uri.partition("://")[0].partition("+")[0] not in SCHEMES:
        raise UsageError(
            f"MLFLOW_TRACKING_URI={masked_uri(uri)} names no MLflow store: it must begin with one of "
            f"{', '.join(f'{scheme}://' for scheme in SCHEMES)} (a plain folder is no longer one)"
        )
    return uri


def masked_uri(text: str) -> str:
    """`text` with the user and password of every URI in it replaced by `***`, and what is no Unicode by `?`."""
    return re.sub(r"://[^/@\s\"']+@", "://***@", text.encode(errors="replace").decode())


def require_shared_store(uri: str, nodes: Iterable[Mapping[str, Any]]) -> None:
    """Raises UsageError for an SQLite store where some alive node of `nodes` (`ray.nodes()`) has another host name than
    this machine: work there could not write it."""
    if sqlite_path(uri) is None:
        return
    here = socket.gethostname()
    elsewhere = sorted({str(n["NodeManagerHostname"]) for n in nodes if n["Alive"]} - {here})
    if elsewhere:
        raise UsageError(
            f"the MLflow store {masked_uri(uri)} is a file on {here}, but the Ray cluster also has "
            f"{', '.join(elsewhere[:3])}{' and others' if len(elsewhere) > 3 else ''}, which cannot write it: "
            "set MLFLOW_TRACKING_URI to the http address of an MLflow server that all nodes reach"
        )


def connect(uri: str) -> "MlflowClient":
    """A client whose store answered. MLflow's chatter on stdout and in the logs is off.

    Raises StoreAway, which names the store and the remedy, where it cannot be reached.
    """
    # Set before the import that reads it; a run must not talk to anybody but the store.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    remedy = "start the server or set MLFLOW_TRACKING_URI to a store that can be reached"
    try:
        if store := sqlite_path(uri):
            remedy = _sqlite_remedy(store)
            store.parent.mkdir(parents=True, exist_ok=True)
            prepare(store)
            # A connection that met a damaged or read-only file would stay so after the file is mended.
            os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        with _few_retries():
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError) as error:
        raise StoreAway(f"the MLflow store {masked_uri(uri)} cannot be used ({cause(error)}): {remedy}") from error
    return client


def _sqlite_remedy(store: Path) -> str:
    place = next(folder for folder in store.parents if folder.exists())
    if place.is_dir() and os.access(place, os.W_OK) and os.access(store if store.exists() else place, os.W_OK):
        return "if the file is no store of MLflow, move it away; or set MLFLOW_TRACKING_URI to another store"
    return f"{store.parent} must be a folder that you may write; or set MLFLOW_TRACKING_URI to another store"


def cause(error: BaseException) -> str:
    """First line of the innermost error: MLflow, SQLAlchemy and requests wrap it in pages."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return masked_uri(str(error).strip().partition("\n")[0] or type(error).__name__)


def quoted(value: str) -> str:
    """A value in a condition of MLflow's searches, which have quotes of two kinds and no escapes."""
    quotes = [mark for mark in ("'", '"') if mark not in value]
    if not quotes:
        raise UsageError(f"{value} has quotes of both kinds: MLflow cannot search for that name, choose another")
    return f"{quotes[0]}{value}{quotes[0]}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite store, None for any other store."""
    match = _SQLITE.match(uri)
    return Path(os.path.abspath(unquote(uri[match.end() :]))) if match else None


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """MLflow retries a dead server for minutes; the first contact should answer soon or say so."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def experiment_id(client: "MlflowClient", uri: str, name: str, about: str | None = None) -> str:
    """Id of the experiment, which is made when missing; beside an SQLite store its artifacts lie in `mlartifacts/`.

    `about`: its description. MLflow's pages open it as one of model training, not of language models.
    """
    from mlflow.exceptions import MlflowException

    location = None  # a server decides itself
    if path := sqlite_path(uri):
        # One folder for any name: separators in it become %2F.
        folder = quote(name, safe=" ") if name.strip(".") else name.replace(".", "%2E")
        location = (path.parent / "mlartifacts" / folder).as_uri()
    if client.get_experiment_by_name(name) is None:
        # Another process may create it in the same moment.
        with contextlib.suppress(MlflowException):
            tags = {KIND_TAG: TRAINING} | ({"mlflow.note.content": about} if about else {})
            return client.create_experiment(name, artifact_location=location, tags=tags)
    experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise UsageError(
            f"the MLflow experiment {name} in {masked_uri(uri)} is deleted: restore it "
            "(`mlflow experiments restore`) or name another"
        )
    if experiment.tags.get(KIND_TAG, "_inferred").endswith("_inferred"):  # of earlier versions, or guessed by a page
        client.set_experiment_tag(experiment.experiment_id, KIND_TAG, TRAINING)
    return experiment.experiment_id


def existing_store(purpose: str, uri: str | None = None) -> "MlflowClient":
    """A client of the store in force. Raises UsageError where an SQLite store would only now be made."""
    uri = tracking_uri(uri)
    if (path := sqlite_path(uri)) and not path.exists():
        raise UsageError(
            f"{purpose}: there is no MLflow store at {path}: go to the folder in which the runs were made, or set "
            "MLFLOW_TRACKING_URI"
        )
    return connect(uri)


def artifact_text(place: str, client: "MlflowClient | None" = None) -> str:
    """Text of `runs:/ID/PATH`, of the store in force or of `client`. Raises UsageError where it has none."""
    from mlflow.exceptions import MlflowException

    client = client or existing_store(place)
    run_id, _, path = place.removeprefix("runs:/").partition("/")
    try:
        with scratch_folder() as folder:
            return Path(client.download_artifacts(run_id, path, str(folder))).read_text()
    except (MlflowException, OSError) as error:
        raise UsageError(f"{place} is not in the MLflow store {masked_uri(tracking_uri())} ({cause(error)})") from error


def how_to_restore(client: "MlflowClient", uri: str, run_id: str) -> str | None:
    """The command that restores a run if somebody deleted it, or its experiment; else None."""
    from mlflow.exceptions import MlflowException

    try:
        about = client.get_run(run_id).info
        experiment = client.get_experiment(about.experiment_id)
    except MlflowException:  # gone for good, or never there
        return None
    if experiment.lifecycle_stage == "deleted":
        what, command = (
            f"the experiment {experiment.name} of ",
            f"experiments restore --experiment-id {about.experiment_id}",
        )
    elif about.lifecycle_stage == "deleted":
        what, command = "", f"runs restore --run-id {run_id}"
    else:
        return None
    store = masked_uri(uri)
    return (
        f"{what}MLflow run {run_id} was deleted in {store}: to have it again, "
        f"MLFLOW_TRACKING_URI={shlex.quote(store)} mlflow {command}"
    )
