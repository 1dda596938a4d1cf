"""Start a run, continue one, or open one that another process writes; by which command, below which other run."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from deedsr.errors import DeeDSRError
from pipelines.tracking.description import KINDS, SECONDS_TAG, SESSION_TAG, Origin
from pipelines.tracking.mirror import Recorded, StoreRefused
from pipelines.tracking.provenance import (
    PARENT_TAG,
    VERSION_TAG,
    HasDigest,
    commit_tags,
    dataset_name,
    library_versions,
    plain,
)
from pipelines.tracking.run import Run
from pipelines.tracking.stale import USER_TAG, close_stale, presence, user
from pipelines.tracking.store import StoreAway, connect, experiment_id
from pipelines.tracking.store import tracking_uri as resolve_uri

PARENT_RUN_TAG = "mlflow.parentRunId"  # MLflow's own name, by which its pages show children below their parent
Value = TypeVar("Value")
_origin: ContextVar[Origin | None] = ContextVar("origin", default=None)
_parent: ContextVar[Callable[[], str] | None] = ContextVar("parent", default=None)
_log = logging.getLogger("deedsr.tracking")


@contextlib.contextmanager
def _within(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def begun_by(origin: Origin) -> contextlib.AbstractContextManager[None]:
    """Every run that this thread starts or continues within is described as begun by `origin`."""
    return _within(_origin, origin)


def children_of(parent: Callable[[], str]) -> contextlib.AbstractContextManager[None]:
    """Every run that this thread starts or continues within becomes a child of the run whose id `parent` returns.

    `parent` is called when such a run begins, so that there need be no parent where there is no child.
    """
    return _within(_parent, parent)


def _parent_tags() -> dict[str, str]:
    parent = _parent.get()
    if parent is None:
        return {}
    with _within(_parent, None):  # `parent` may start a run, which has none above it
        return {PARENT_RUN_TAG: parent()}


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
    fault_tolerant: bool = False,
    permit: Callable[[], bool] = lambda: True,
    out: str | None = None,
) -> Run:
    """Start a run, or continue `run_id`.

    Args:
        experiment: one of `EXPERIMENTS` or any other name; made when missing.
        name: shown in MLflow's run table where no command begins the run; see `description.Origin`.
        config: whole resolved configuration: nested mappings of plain values (others become their `str`).
        dataset: the dataset that the run reads.
        parents: run ids by role, for example `{"shards": ID, "learner": ID}`; unknown ones (None) are left out.
        run_id: continue this run: it is RUNNING again, metric steps that it already holds are skipped, and a
            parameter that now differs gets the tag `deedsr.config.NAME` with the new value.
        tags: further tags.
        tracking_uri: store; see `tracking_uri()`.
        system_metrics: sample this machine's CPU, memory, disk, network and GPU until the run is closed. A driver
            whose run is written by a worker says False.
        fault_tolerant: the work outlives the store: a run to continue needs no store yet, and `finish` raises nothing.
        permit: whether this process may still write the run, asked before each sending; once False, it writes no more.
        out: where the results go. Runs of this user that were killed there end as KILLED; see `stale`.

    Raises:
        UsageError: the store cannot be reached, or has no run `run_id`.
    """
    uri = resolve_uri(tracking_uri)
    config = plain(config)
    tags = _parent_tags() | dict(tags or {})
    new, origin, kind = run_id is None, _origin.get(), tags.get("deedsr.kind", "")
    chosen = origin.name if origin and PARENT_RUN_TAG not in tags else None
    session = {SECONDS_TAG: "0", SESSION_TAG: str(int(time.time() * 1000))}
    if run_id is None:
        client = connect(uri)
        if origin:
            name = chosen or origin.run_name(kind, dataset_name(dataset) if dataset else name)
        about = experiment_id(client, uri, experiment, KINDS.get(kind))
        run_id = client.create_run(about, run_name=name).info.run_id
    run = Run(uri, run_id, fault_tolerant, permit)

    def begin() -> None:
        if not new:
            run._set_running(session, chosen)
        if out is not None:
            with run._reaching_store():
                close_stale(run.client, out, apart_from=run.id)
        run._log_config(config)
        run.set_tags(
            commit_tags()
            | {VERSION_TAG + k: v for k, v in library_versions().items()}
            | session
            | (origin.run_tags() if origin else {})
            | {PARENT_TAG + role: parent for role, parent in (parents or {}).items()}
            | (presence(out) if out else {USER_TAG: user()})
            | dict(tags or {})
        )
        if dataset is not None:
            run.log_dataset(dataset, context=experiment.removeprefix("deedsr-"))
        run.describe()
        if system_metrics:
            run._watch_system()

    try:
        begin()
    except (StoreAway, StoreRefused) as error:
        if new or not fault_tolerant:
            raise
        _log.warning("%s; the work goes on, and what is logged is kept and sent later", error)
        run.later(begin)
    except BaseException:
        with contextlib.suppress(DeeDSRError):  # what stopped the work matters more
            run.finish("FAILED")
        raise
    return run


def open_run(
    tracking_uri: str,
    run_id: str,
    *,
    system_metrics: bool = True,
    permit: Callable[[], bool] = lambda: True,
    recorded: Recorded | None = None,
) -> Run:
    """Open a run that another process started, to write it from here; fault-tolerant. It is RUNNING again.

    Returns at once and never raises for a store that is away. `permit`: see `start_run`; `recorded`: see `Run.replay`.
    """
    run = Run(resolve_uri(tracking_uri), run_id, fault_tolerant=True, permit=permit)
    if recorded is not None:
        run.replay(recorded)  # before system metrics count on from what the store holds
    run.later(run._set_running)
    if system_metrics:
        run.later(run._watch_system)
    return run
