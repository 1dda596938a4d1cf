"""Runs being written: start one, continue one, open one from another process."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deedsr.errors import DeeDSRError, UsageError
from pipelines.tracking.provenance import (
    COMMIT_TAG,
    CONFIG_TAG,
    DIGEST_TAG,
    PARENT_TAG,
    VERSION_TAG,
    HasDigest,
    flatten,
    git_commit,
    library_versions,
    param_text,
    plain,
)
from pipelines.tracking.store import cause, connect, experiment_id, masked_uri
from pipelines.tracking.store import tracking_uri as resolve_uri

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient

FLUSH_SECONDS = 5.0
# Limits of MLflow's stores.
MAX_KEY_CHARACTERS = 250
MAX_PARAMS_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1000
MAX_DIGEST_CHARACTERS = 36

_log = logging.getLogger("deedsr.tracking")


def start_run(
    experiment: str,
    *,
    name: str,
    config: Mapping[str, Any],
    dataset: HasDigest | None = None,
    parents: Mapping[str, str | None] | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    tracking_uri: str | None = None,
    system_metrics: bool = True,
) -> "Run":
    """Start a run, or continue `run_id`.

    Args:
        experiment: one of `EXPERIMENTS` or any other name; made when missing.
        name: shown in MLflow's run table.
        config: whole resolved configuration: nested mappings of plain values (others become their `str`).
        dataset: the dataset that the run reads.
        parents: run ids by role, for example `{"shards": ID, "learner": ID}`; unknown ones (None) are left out.
        run_id: continue this run: it is RUNNING again, metric steps that it already holds are skipped, and a
            parameter that now differs gets the tag `deedsr.config.NAME` with the new value.
        tags: further tags.
        tracking_uri: store; see `tracking_uri()`.
        system_metrics: sample this machine's CPU, memory, disk, network and GPU until the run is closed. A driver
            whose run is written by a worker says False.

    Raises:
        UsageError: the store cannot be reached, or has no run `run_id`.
    """
    uri = resolve_uri(tracking_uri)
    client = connect(uri)
    config = plain(config)
    if run_id is None:
        run_id = client.create_run(experiment_id(client, uri, experiment), run_name=name).info.run_id
    else:
        _set_running(client, uri, run_id)
    run = Run(client, uri, run_id)
    try:
        run._log_config(config)
        run.set_tags(
            {COMMIT_TAG: git_commit(), **{VERSION_TAG + k: v for k, v in library_versions().items()}}
            | {PARENT_TAG + role: parent for role, parent in (parents or {}).items()}
            | dict(tags or {})
        )
        if dataset is not None:
            run.log_dataset(dataset, context=experiment.removeprefix("deedsr-"))
        if system_metrics:
            run._watch_system()
    except BaseException:
        run.finish("FAILED")
        raise
    return run


def open_run(tracking_uri: str, run_id: str, *, system_metrics: bool = True) -> "Run":
    """Open a run that another process started, to write it from here. It is RUNNING again.

    Raises:
        UsageError: the store cannot be reached, or has no run `run_id`.
    """
    uri = resolve_uri(tracking_uri)
    client = connect(uri)
    _set_running(client, uri, run_id)
    run = Run(client, uri, run_id)
    if system_metrics:
        run._watch_system()
    return run


def find_run(experiment: str | None, tags: Mapping[str, str], tracking_uri: str | None = None) -> str | None:
    """Id of the newest run with all these tags, in one experiment or (None) in all; None when there is none."""
    client = connect(resolve_uri(tracking_uri))
    if experiment is None:
        experiments = client.search_experiments()
    else:
        found = client.get_experiment_by_name(experiment)
        experiments = [found] if found else []
    if not experiments:
        return None
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    runs = client.search_runs(
        [e.experiment_id for e in experiments], condition, order_by=["attributes.start_time DESC"], max_results=1
    )
    return runs[0].info.run_id if runs else None


def _set_running(client: "MlflowClient", uri: str, run_id: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        raise UsageError(
            f"the MLflow store {masked_uri(uri)} has no run {run_id} to continue: set MLFLOW_TRACKING_URI to the "
            "store in which the work was begun, or begin anew with another --out"
        ) from error


class Run:
    """A run being written. A context manager: an exception ends it as FAILED, Ctrl-C as KILLED.

    Attributes:
        id: MLflow run id.
        tracking_uri: its store. May hold credentials: print `masked_uri(run.tracking_uri)`.
    """

    def __init__(self, client: "MlflowClient", tracking_uri: str, run_id: str):
        self.id = run_id
        self.tracking_uri = tracking_uri
        self._client = client
        self._monitor: Any = None
        self._pending: list[Any] = []
        self._pending_lock = threading.Lock()
        self._send_lock = threading.Lock()  # batches are sent one after the other, so a stored step has no gap below
        self._last_step: dict[str, int] | None = None
        self._closed = threading.Event()
        self._sender: threading.Thread | None = None

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers of one step. Returns at once: they are sent in batches every few seconds and by `flush`.

        For each metric, steps up to the last that the run holds are skipped, so repeated steps after a resume are
        stored once. Call `flush` before a checkpoint is committed, so that a crash leaves no gap.
        """
        from mlflow.entities import Metric

        if self._last_step is None:
            # MLflow has no public accessor for the latest step of all metrics; whole histories would be slow.
            stored = self._client.get_run(self.id).data._metric_objs
            self._last_step = {metric.key: metric.step for metric in stored}
        now = int(time.time() * 1000)
        fresh = [
            Metric(name, float(value), now, step)
            for name, value in values.items()
            if step > self._last_step.get(name, -1)
        ]
        self._last_step.update({metric.key: step for metric in fresh})
        with self._pending_lock:
            self._pending += fresh
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_regularly, name="mlflow-metrics", daemon=True)
            self._sender.start()

    def flush(self) -> None:
        """Send what is pending now.

        Raises:
            DeeDSRError: the store did not take it. Nothing is lost: it stays pending.
        """
        with self._send_lock:
            while self._pending:
                batch = self._pending[:MAX_METRICS_PER_BATCH]
                with self._reaching_store():
                    self._client.log_batch(self.id, metrics=batch)
                with self._pending_lock:
                    del self._pending[: len(batch)]

    def log_picture(self, name: str, image_HWC: "np.ndarray") -> None:
        """Store a uint8 RGB picture as artifact `pictures/{name}.png`."""
        with self._reaching_store():
            self._client.log_image(self.id, image_HWC, artifact_file=f"pictures/{name}.png")

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Store a file, or a directory with what it holds, among the artifacts."""
        with self._reaching_store():
            send = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
            send(self.id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """Store a text as artifact `name`."""
        with self._reaching_store():
            self._client.log_text(self.id, text, name)

    def log_dataset(self, dataset: HasDigest, context: str) -> None:
        """Record a dataset as MLflow dataset input (in MLflow's 36 characters) and its whole digest as tag."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        uri = masked_uri(str(dataset.uri))
        source_type = "s3" if uri.startswith("s3://") else "local"
        entity = Dataset(
            name=uri.rstrip("/").rsplit("/", 1)[-1] or uri,
            digest=dataset.digest[:MAX_DIGEST_CHARACTERS],
            source_type=source_type,
            source=json.dumps({"uri": uri}),
        )
        with self._reaching_store():
            self._client.log_inputs(self.id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])
        self.set_tags({DIGEST_TAG: dataset.digest})

    def set_tags(self, tags: Mapping[str, str | None]) -> None:
        """Set tags; those whose value is None are left alone."""
        from mlflow.entities import RunTag

        entities = [RunTag(name, masked_uri(str(value))) for name, value in tags.items() if value is not None]
        with self._reaching_store():
            for i in range(0, len(entities), MAX_PARAMS_PER_BATCH):
                self._client.log_batch(self.id, tags=entities[i : i + MAX_PARAMS_PER_BATCH])

    def close(self) -> None:
        """Send what is pending and stop the threads; the status stays RUNNING for whoever writes on."""
        self._closed.set()
        if self._sender is not None:
            self._sender.join()
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        self.flush()

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run as `FINISHED`, `FAILED` or `KILLED`."""
        self.close()
        with self._reaching_store():
            self._client.set_terminated(self.id, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish()
            return
        try:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        except DeeDSRError as lost:  # what stopped the work matters more
            _log.warning("%s", lost)

    def _send_regularly(self) -> None:
        while not self._closed.wait(FLUSH_SECONDS):
            try:
                self.flush()
            except DeeDSRError as error:  # stays pending; `flush` and `finish` raise if it never succeeds
                _log.warning("%s; trying again", error)

    def _watch_system(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(self.id, resume_logging=True, tracking_uri=self.tracking_uri)
        self._monitor.start()

    def _log_config(self, config: dict[str, Any]) -> None:
        import yaml
        from mlflow.entities import Param

        flat = {key[:MAX_KEY_CHARACTERS]: param_text(value) for key, value in flatten(config).items()}
        with self._reaching_store():
            stored = self._client.get_run(self.id).data.params
            fresh = [Param(key, value) for key, value in flat.items() if key not in stored]
            for i in range(0, len(fresh), MAX_PARAMS_PER_BATCH):
                self._client.log_batch(self.id, params=fresh[i : i + MAX_PARAMS_PER_BATCH])
        self.set_tags({CONFIG_TAG + key: flat[key] for key, value in stored.items() if flat.get(key, value) != value})
        self.log_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), "config.yaml")

    @contextlib.contextmanager
    def _reaching_store(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise DeeDSRError(
                f"the MLflow store {masked_uri(self.tracking_uri)} did not take what run {self.id} logs "
                f"({cause(error)}): see that it runs and has space, then start the same command again, "
                "which continues the run"
            ) from error
