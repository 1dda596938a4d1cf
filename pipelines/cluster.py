"""The Ray cluster that work runs on: the one `RAY_ADDRESS` names, as inside a submitted job, else one of our own."""

import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from deedsr.errors import DeeDSRError, UsageError
from pipelines import autoscaler, machine
from pipelines.placement import Nodes, Offer, TrainingPlan, WorkPlan
from pipelines.storage import open_storage

__all__ = [
    "CannotHold",
    "arrow_filesystem",
    "connect",
    "data",
    "error_values",
    "is_local",
    "nodes",
    "offer",
    "raise_error",
    "scratch",
    "this_machine",
    "wait_for",
]

logger = logging.getLogger(__name__)

# The object store only passes plans, summaries and metrics; Ray's default is a third of the memory.
_OBJECT_STORE = 256 << 20
# Ray makes sockets below its temporary folder, and systems take at most 107 bytes for the path of one.
_LONGEST_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_SHORT_FOLDERS = ("/tmp", "/var/tmp")
_POLL_SECONDS = 1.0
_LINE_SECONDS = 30.0  # between two lines on what is waited for


def connect() -> None:
    """Connects this process to Ray, once. A local cluster ends with the process, however that ends.

    Raises UsageError if `RAY_ADDRESS` names a cluster that does not answer, DeeDSRError if none starts here.
    """
    # Read by Ray at import and by the processes it starts: no telemetry, and no remark on machines without GPU.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    with _own_answer_to_sigterm():
        _connect(os.environ.get("RAY_ADDRESS"))


@contextmanager
def _own_answer_to_sigterm() -> Iterator[None]:
    """Keeps this process's: Ray's ends in an abort of its C++ part, with another exit code than a signal's."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _connect(address: str | None) -> None:
    import ray

    if not address:
        folder = _session_folder()
        try:
            # "local" never joins a cluster that somebody else runs on this machine.
            ray.init(
                address="local",
                _temp_dir=folder,
                num_cpus=machine.this_machine().cpus,
                num_gpus=machine.gpus(),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                logging_level="ERROR",
                log_to_driver=False,
            )
        except Exception as error:  # Ray has no narrower class for a start that timed out
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DeeDSRError(
                f"Ray did not start on this machine: {reason} If the machine is very busy, run the command again later"
            ) from error
        return
    try:
        # What workers log stays in Ray's files, as on one machine: what a user should see comes through the command.
        ray.init(address=address, logging_level="WARNING", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"no Ray cluster answers at RAY_ADDRESS={address}: start it, or unset RAY_ADDRESS") from error


def _session_folder() -> str | None:
    """Folder for Ray's sockets, None for Ray's default. Ray needs a short ASCII path, unlike the TMPDIR of some batch
    systems. Raises UsageError where no such folder can be written.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    given = os.environ.get(name, "")
    if len(given) <= _LONGEST_FOLDER and given.isascii():
        return None
    if name == "TMPDIR":
        for folder in _SHORT_FOLDERS:
            if os.access(folder, os.W_OK | os.X_OK):
                return f"{folder}/ray"
    raise UsageError(
        f"{name} is {given}: Ray needs a folder whose path is at most {_LONGEST_FOLDER} ASCII characters long, "
        "name one by RAY_TMPDIR"
    )


def data() -> Any:
    """`ray.data` on the connected cluster, without its own progress bars and remarks: ours are shown instead."""
    connect()
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data


def error_values(error: DeeDSRError | None = None) -> dict[str, Any]:
    """The error of a task as values of its row: an exception would come back wrapped in Ray's traceback.

    File names in the message that are not Unicode are escaped, because a row holds Unicode only.
    """
    text = str(error or "").encode(errors="backslashreplace").decode()
    return {"error": text, "usage": isinstance(error, UsageError)}


def raise_error(row: dict[str, Any]) -> None:
    """Raises the error that `error_values` stored in a row, if there is one."""
    if row["error"]:
        raise (UsageError if row["usage"] else DeeDSRError)(row["error"])


def nodes() -> list[dict[str, Any]]:
    """`ray.nodes()` of the connected cluster."""
    import ray

    return ray.nodes()


def offer() -> Offer:
    """What the connected cluster has, and what its autoscaler may add."""
    shapes = Counter(
        (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in nodes() if node["Alive"]
    )
    there = tuple(Nodes(cpus, gpus, count) for (cpus, gpus), count in shapes.items())
    if is_local():
        here = machine.this_machine()
        return Offer(there, local=True, memory=here.memory, shared_memory=here.shared_memory)
    growth = autoscaler.growth()
    return Offer(there, growth, answers=growth is None and autoscaler.answers())


def this_machine() -> Offer:
    """What this machine offers to a command that computes by itself, without Ray."""
    here = machine.this_machine()
    return Offer((Nodes(here.cpus, machine.gpus()),), local=True, memory=here.memory)


class CannotHold(UsageError):
    """The cluster has not what a plan needs, and its autoscaler cannot add it."""


def wait_for(plan: TrainingPlan | WorkPlan, without: str) -> None:
    """Waits until the connected cluster can hold the first workers of `plan`; an autoscaler starts nodes for them.

    `without`: the option that would do without GPUs, for the line that is logged every half minute. Raises CannotHold
    where the cluster has not enough, and nothing can add it.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    there = offer()
    if there.local:
        return
    group = placement_group([plan.bundle] * plan.fewest)
    fits = replace(there, growth=()).holds(plan.cpus, plan.gpus) >= plan.fewest  # once other work has ended
    began = said = time.monotonic()
    try:
        while not group.wait(_POLL_SECONDS):
            if not fits and autoscaler.refuses(group):
                raise CannotHold(f"this cluster cannot hold {_words(plan)}: {_state(plan, without)}")
            now = time.monotonic()
            if now - said >= _LINE_SECONDS:
                said = now
                logger.info("waiting %.0f s for %s: %s", now - began, _words(plan), _state(plan, without))
    finally:
        remove_placement_group(group)


def _words(plan: TrainingPlan | WorkPlan) -> str:
    return f"{plan.fewest} x {{{', '.join(f'{kind} {amount:g}' for kind, amount in plan.bundle.items())}}}"


def _state(plan: TrainingPlan | WorkPlan, without: str) -> str:
    import ray

    free = ray.available_resources()
    there = "free: " + ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in plan.bundle)
    return "; ".join(filter(None, [there, autoscaler.coming(), without if plan.gpus else ""]))


def is_local() -> bool:
    """Whether the whole cluster is this machine and nothing joined it from outside."""
    hosts = {node["NodeManagerHostname"] for node in nodes() if node["Alive"]}
    return not os.environ.get("RAY_ADDRESS") and hosts == {socket.gethostname()}


@contextmanager
def scratch(uri: str, name: str) -> Iterator[tuple[str, Any]]:
    """A folder below `uri` as (path, pyarrow file system), removed with all it holds on leaving."""
    storage = open_storage(uri).child(name)
    path, filesystem = arrow_filesystem(storage.uri)
    try:
        yield path, filesystem
    finally:
        local = storage.local_path("")
        if local is not None:
            shutil.rmtree(local, ignore_errors=True)
        else:
            for entry in list(storage.list()):
                storage.delete(entry.path)


def arrow_filesystem(uri: str) -> tuple[str, Any]:
    """The path that pyarrow wants for `uri`, and its file system, set up from the same AWS variables as ours."""
    from pyarrow import fs

    storage = open_storage(uri)
    if not storage.uri.startswith("s3://"):
        return storage.uri, fs.LocalFileSystem()
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options = {
        "region": region,
        "endpoint_override": endpoint.netloc or None,
        "scheme": endpoint.scheme or None,
        "allow_bucket_creation": False,
    }
    return storage.uri.removeprefix("s3://"), fs.S3FileSystem(**{k: v for k, v in options.items() if v is not None})
