"""A run being written."""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deedsr.errors import DeeDSRError, UsageError
from pipelines.tracking.description import (
    NOTE_TAG,
    SECONDS_TAG,
    describe,
    machine_tags,
    seconds_so_far,
)
from pipelines.tracking.mirror import SYSTEM, Mirror, NeverTaken, Point, StoreRefused
from pipelines.tracking.provenance import (
    CONFIG_TAG,
    DIGEST_TAG,
    HasDigest,
    dataset_name,
    flatten,
    param_text,
)
from pipelines.tracking.search import AT_STEP, BEST_TAG, higher_is_better
from pipelines.tracking.store import cause, connect, how_to_restore, masked_uri

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient

END_SECONDS = 60.0  # that the end of a fault-tolerant run tries to reach a store that is away
STOP_SECONDS = 60.0  # of the one try where a fault-tolerant run is only left, or did not get to its end
# Limits of MLflow's stores.
MAX_KEY_CHARACTERS = 250
MAX_PARAMS_PER_BATCH = 100
MAX_DIGEST_CHARACTERS = 36
VALIDATION = "validation/"

_log = logging.getLogger("deedsr.tracking")


class Run(Mirror):
    """A run being written. A context manager: an exception ends it as FAILED, Ctrl-C as KILLED.

    Attributes:
        id: MLflow run id.
        tracking_uri: its store. May hold credentials: print `masked_uri(run.tracking_uri)`.
    """

    def __init__(
        self, tracking_uri: str, run_id: str, fault_tolerant: bool = False, permit: Callable[[], bool] = lambda: True
    ):
        self.id = run_id
        self.tracking_uri = tracking_uri
        self.fault_tolerant = fault_tolerant
        super().__init__(f"the MLflow store {masked_uri(tracking_uri)}", permit)
        self._monitor: Any = None
        self._finished = False
        self._logged: list[Point] = []
        self._logging = threading.Lock()  # system metrics come from a thread of their own
        if fault_tolerant:
            # The mirror tries again for as long as it takes; MLflow would hold each try for minutes.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

    @cached_property
    def client(self) -> "MlflowClient":
        """MLflow's own, connected when it is first asked for. Raises UsageError where the store is away."""
        return connect(self.tracking_uri)

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers of one step. Returns at once: they are sent in batches every few seconds and by `flush`.

        For each metric, steps up to the last that the store holds are not sent, so repeated steps after a resume are
        stored once. A fault-tolerant run is to put what it has `logged` into its own record, and to `replay` that after
        a restart: then no step is lost.
        """
        now = int(time.time() * 1000)
        points = [Point(name, float(value), now, step) for name, value in values.items()]
        if self.fault_tolerant:
            with self._logging:
                self._logged += points
        self._add(points)

    def logged(self) -> list[Point]:
        """What was logged since this was asked last, whether the store has it or not."""
        with self._logging:
            points, self._logged = self._logged, []
        return points

    def log_picture(self, name: str, image_HWC: "np.ndarray", step: int | None = None) -> None:
        """Store a uint8 RGB picture as artifact `pictures/{name}.png`; with a step also in MLflow's series of images,
        below `examples/`, which MLflow's pages show before the curves.

        A fault-tolerant run returns at once and stores it later.
        """

        def store() -> None:
            with self._reaching_store():
                self.client.log_image(self.id, image_HWC, artifact_file=f"pictures/{name}.png")
                if step is not None:
                    self.client.log_image(self.id, image_HWC, key=f"examples/{Path(name).name}", step=step)

        self.later(store) if self.fault_tolerant else store()

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Store a file, or a directory with what it holds, among the artifacts."""
        with self._reaching_store():
            send = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
            send(self.id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """Store a text as artifact `name`."""
        with self._reaching_store():
            self.client.log_text(self.id, text, name)

    def log_dataset(self, dataset: HasDigest, context: str) -> None:
        """Record a dataset as MLflow dataset input (in MLflow's 36 characters) and its whole digest as tag."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        uri = masked_uri(str(dataset.uri))
        source_type = "s3" if uri.startswith("s3://") else "local"
        entity = Dataset(
            name=dataset_name(dataset),
            digest=dataset.digest[:MAX_DIGEST_CHARACTERS],
            source_type=source_type,
            source=json.dumps({"uri": uri}),
        )
        with self._reaching_store():
            self.client.log_inputs(self.id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])
        self.set_tags({DIGEST_TAG: dataset.digest})

    def describe(self) -> None:
        """Write the run's description anew, from what the store has of it."""
        with self._reaching_store():
            text = describe(self.client, self.client.get_run(self.id))
        self.set_tags({NOTE_TAG: text})

    def set_tags(self, tags: Mapping[str, str | None]) -> None:
        """Set tags; those whose value is None are left alone."""
        from mlflow.entities import RunTag

        entities = [RunTag(name, masked_uri(str(value))) for name, value in tags.items() if value is not None]
        with self._reaching_store():
            for i in range(0, len(entities), MAX_PARAMS_PER_BATCH):
                self.client.log_batch(self.id, tags=entities[i : i + MAX_PARAMS_PER_BATCH])

    def close(self, to_the_end: bool = False) -> bool:
        """Send what is pending and stop the threads; the status stays RUNNING for whoever writes on.

        True when the store took all. Where it did not, a fault-tolerant run returns False, after one try or, with
        `to_the_end`, after `END_SECONDS`; another one raises DeeDSRError.
        """
        self._stop_monitor()
        try:
            if self.fault_tolerant:
                return self._drain(END_SECONDS if to_the_end else STOP_SECONDS, again=to_the_end)
            self.flush()
            return True
        finally:
            self._stop()

    def finish(self, status: str = "FINISHED") -> bool:
        """Close the run as `FINISHED`, `FAILED` or `KILLED`; `close` says what becomes of the rest."""
        if self._finished:
            return True
        self._finished = True
        if self.fault_tolerant:
            self._stop_monitor()
            self.later(lambda: self._terminate(status))
            return self.close(to_the_end=status == "FINISHED")
        self.close()
        if self._permit():
            self._terminate(status)
        return True

    def _terminate(self, status: str) -> None:
        with self._reaching_store():
            self.client.set_terminated(self.id, status)
            self._log_best()
        self.set_tags(machine_tags())
        self.describe()

    def _log_best(self) -> None:
        """Tags with the best value of each metric of the validation; the last one is among the metrics."""
        for name in [name for name in self.client.get_run(self.id).data.metrics if name.startswith(VALIDATION)]:
            higher = higher_is_better(name)
            if higher is not None and name.count("/") == 1 and not name.endswith("_bicubic"):
                history = self.client.get_metric_history(self.id, name)
                best = (max if higher else min)(history, key=lambda point: point.value)
                text = f"{best.value:.6g}{AT_STEP}{best.step}"
                self.client.set_tag(self.id, f"{BEST_TAG}{name.removeprefix(VALIDATION)}", text)

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish()
            return
        try:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        except DeeDSRError as lost:  # what stopped the work matters more
            _log.warning("%s", lost)

    def _send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        with self._reaching_store():
            self.client.log_batch(self.id, metrics=[Metric(*point) for point in points])

    def _stored_steps(self) -> dict[str, int]:
        with self._reaching_store():
            # MLflow has no public accessor for the latest step of all metrics; whole histories would be slow.
            return {metric.key: metric.step for metric in self.client.get_run(self.id).data._metric_objs}

    def _set_running(self, session: dict[str, str] | None = None, name: str | None = None) -> None:
        """`session`: of a run that is continued; gets the seconds of the sessions before it. `name`: a new one."""
        from mlflow.exceptions import MlflowException

        with self._reaching_store():
            try:
                if session:
                    session[SECONDS_TAG] = f"{seconds_so_far(self.client.get_run(self.id)):.1f}"
                self.client.update_run(self.id, status="RUNNING", name=name)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                raise UsageError(
                    how_to_restore(self.client, self.tracking_uri, self.id)
                    or f"the MLflow store {masked_uri(self.tracking_uri)} has no run {self.id} to continue: set "
                    "MLFLOW_TRACKING_URI to the store in which the work was begun, or begin anew with another --out"
                ) from error

    def _watch_system(self) -> None:
        """Sample this machine's CPU, memory, disk, network and GPU, and send that the way of all metrics."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        class Monitor(SystemMetricsMonitor):
            def monitor(self) -> None:
                """In place of MLflow's own loop, which ends for good when the store is away once."""
                self.collect_metrics()  # rates of network and disk are differences from here on
                while not self._shutdown_event.wait(self.sampling_interval):
                    self.collect_metrics()
                    self.publish_metrics(self.aggregate_metrics())

        self._monitor = Monitor(self.id, tracking_uri=self.tracking_uri)
        self._monitor.mlflow_logger.record_metrics = self.log_metrics
        self._monitor._logging_step = self._last_step(SYSTEM) + 1
        self._monitor.start()

    def _log_config(self, config: dict[str, Any]) -> None:
        import yaml
        from mlflow.entities import Param

        flat = {key[:MAX_KEY_CHARACTERS]: param_text(value) for key, value in flatten(config).items()}
        with self._reaching_store():
            stored = self.client.get_run(self.id).data.params
            fresh = [Param(key, value) for key, value in flat.items() if key not in stored]
            for i in range(0, len(fresh), MAX_PARAMS_PER_BATCH):
                self.client.log_batch(self.id, params=fresh[i : i + MAX_PARAMS_PER_BATCH])
        self.set_tags({CONFIG_TAG + key: flat[key] for key, value in stored.items() if flat.get(key, value) != value})
        self.log_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), "config.yaml")

    @contextlib.contextmanager
    def _reaching_store(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            # The one code that blames what was sent; MLflow has BAD_REQUEST for a database that is away, too.
            never = getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
            if never and (remedy := how_to_restore(self.client, self.tracking_uri, self.id)):
                raise StoreRefused(remedy) from error
            raise (NeverTaken if never else StoreRefused)(
                f"the MLflow store {masked_uri(self.tracking_uri)} did not take what run {self.id} logs "
                f"({cause(error)}): see that it runs and has space, then start the same command again, "
                "which continues the run"
            ) from error
