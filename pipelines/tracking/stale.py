"""Runs that are RUNNING in the store and that nobody writes any more, because their process was killed.

A run's tags name its `--out`, its process and its user. It is alive while a heartbeat of that process in `--out` is not
older than ten minutes; for a process of this machine the operating system is asked.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from deedsr.errors import DeeDSRError
from pipelines import claims, machine
from pipelines.storage import open_storage, waiting
from pipelines.tracking.search import search
from pipelines.tracking.store import masked_uri, quoted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

OUT_TAG, PROCESS_TAG, USER_TAG = "deedsr.out", "deedsr.process", "mlflow.user"
USER_VARIABLE = "DEEDSR_USER"  # who submitted a job, which runs under another user's name
_ANSWER_SECONDS = 30.0


def user() -> str:
    """Name of the user whose work this process does."""
    return os.environ.get(USER_VARIABLE) or machine.user_name()


def presence(out: str) -> dict[str, str]:
    """Tags of a run that this process writes, whose results go to `out`."""
    process = json.dumps(claims.of_this_process())
    return {OUT_TAG: masked_uri(open_storage(out).uri), PROCESS_TAG: process, USER_TAG: user()}


@dataclass
class Closed:
    """What became of the runs that were RUNNING: ids of those that were ended, and of others with the reason."""

    closed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def close_stale(
    client: "MlflowClient",
    out: str | None = None,
    older: timedelta = timedelta(),
    everyone: bool = False,
    apart_from: str = "",
) -> Closed:
    """Ends, as KILLED, the runs of this user (or `everyone`) that have no heartbeat any more, in a store that answers.

    `out`: only runs that write there; `older`: only those whose last heartbeat is at least so old; `apart_from`: id of
    a run to leave alone.
    """
    result = Closed()
    for run in _running(client, out):
        if run.info.run_id == apart_from:
            continue
        try:
            reason, last = _state(run.data.tags)
        except DeeDSRError as error:
            reason, last = f"its out cannot be read: {error}", 0.0
        owner = run.data.tags.get(USER_TAG, "unknown")
        if not everyone and owner != user():
            reason = f"of {owner}"
        elif not reason and time.time() - last < older.total_seconds():
            reason = f"last heartbeat {(time.time() - last) / 60:.0f} min ago"
        if reason:
            result.left[run.info.run_id] = reason
        else:
            client.set_terminated(run.info.run_id, "KILLED", end_time=int(last * 1000))
            result.closed.append(run.info.run_id)
    return result


def _running(client: "MlflowClient", out: str | None) -> "list[Run]":
    """Runs of this project whose status is RUNNING."""
    condition = "attributes.status = 'RUNNING'"
    if out is not None:
        condition += f" and tags.`{OUT_TAG}` = {quoted(masked_uri(open_storage(out).uri))}"
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run for run in search(client, experiments, condition) if PROCESS_TAG in run.data.tags]


def _state(tags: Mapping[str, str]) -> tuple[str, float]:
    """(why the run may be alive, "" where it is not; the time of its last heartbeat)."""
    process = json.loads(tags[PROCESS_TAG])
    out = tags.get(OUT_TAG, "")
    if process["processes"] == machine.process_space():
        runs = machine.runs(process["pid"], since=process["alive"])
        return ("its process runs" if runs else "", process["alive"])
    if "://" not in out and not Path(out).exists() and process["host"] != socket.gethostname():
        return f"its out {out} is on {process['host']}", 0.0
    with waiting.within(_ANSWER_SECONDS):
        found = [claim for _, claim in claims.found(open_storage(out)) if claim]
    identity = ("host", "pid", "processes")
    beats = [process, *(claim for claim in found if all(claim.get(name) == process[name] for name in identity))]
    alive = any(claims.is_alive(claim) and not claim.get("ended") for claim in beats)
    return ("it has a heartbeat" if alive else "", max(claim["alive"] for claim in beats))
