"""The Ray cluster that work runs on: the one `RAY_ADDRESS` names, as inside a submitted job, else one of our own."""

import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from deedsr.errors import DeeDSRError, UsageError
from pipelines import autoscaler, machine
from pipelines.placement import Nodes, Offer, Plan
from pipelines.storage import open_storage, waiting

logger = logging.getLogger(__name__)

# The object store only passes plans, summaries and metrics; Ray's default is a third of the memory.
_OBJECT_STORE = 256 << 20
_ANSWER_SECONDS = 10.0  # that a cluster is given to answer, in which a head can come back
# Ray makes sockets below its temporary folder, and systems take at most 107 bytes for the path of one.
_LONGEST_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_SHORT_FOLDERS = ("/tmp", "/var/tmp")
_ADDED_LINES = ("Failed to apply UDF transform", "To change retry attempts")  # added by Ray Data to a task's message
_POLL_SECONDS = 1.0
_kills = 0  # processes killed for want of memory before this one connected
_LINE_SECONDS = 30.0  # between two lines on what is waited for


def connect() -> None:
    """Connects this process to Ray, once. A local cluster ends with the process, however that ends.

    Raises UsageError if `RAY_ADDRESS` names a cluster that does not answer, DeeDSRError if none starts here.
    """
    global _kills
    _kills = machine.memory_kills()
    require_docstrings()
    # Read by Ray at import and by the processes it starts: no telemetry, and no warning on machines without a GPU.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        _connect(os.environ.get("RAY_ADDRESS"))
    finally:  # Ray's handler of SIGTERM ends in an abort of its C++ part, with another exit code than a signal's
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def failure_message(error: BaseException, less: str) -> str:
    """One line for a failure of Ray: its last line, or that memory ran out. `less`: what would need less memory."""
    text = "\n".join(line for line in str(error).strip().splitlines() if not line.startswith(_ADDED_LINES))
    if "OutOfMemoryError" in f"{type(error).__name__} {text}" or machine.memory_kills() > _kills:
        limit = machine.this_machine().memory
        return f"a worker was killed, because the work needed more than the {limit / 1e9:.1f} GB of memory here: {less}"
    return text.splitlines()[-1] if text else type(error).__name__


def require_docstrings() -> None:
    """Refuses an interpreter without docstrings, which Ray's modules change while they are imported."""
    if sys.flags.optimize > 1:
        raise UsageError(
            "Ray does not run without docstrings, which PYTHONOPTIMIZE=2 (python -OO) removes: unset it, or set it to 1"
        )


def _connect(address: str | None) -> None:
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    # Ray's messages about dead workers and raylets stay in its log files; Ray has no option for that.
    ray._private.worker._worker_logs_enabled = False
    if not address or address == "local":
        # A token of its own: Ray would keep one in the home folder, which not every container has.
        if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
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
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            late = "timed out" in reason or "timeout" in reason.lower()
            remedy = "; on a very busy machine run the command again later" if late else ""
            raise DeeDSRError(f"Ray did not start on this machine: {reason}{remedy}") from error
        return
    silence = UsageError(f"no Ray cluster answers at RAY_ADDRESS={address}: start it, or unset RAY_ADDRESS")
    try:
        place = address.partition("://")[2] or canonicalize_bootstrap_address(address)
        if place is None or not _answers(place):
            raise silence
        # What workers log stays in Ray's files, as on one machine: what a user should see comes through the command.
        ray.init(address=address, logging_level="WARNING", log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise silence from error


def _answers(address: str) -> bool:
    """Whether a gRPC server answers at HOST:PORT; Ray itself would try for minutes."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    channel = init_grpc_channel(address)
    try:
        grpc.channel_ready_future(channel).result(timeout=_ANSWER_SECONDS)
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()
    return True


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
    return Offer(there, growth, answers=growth is None and autoscaler.is_v2())


def this_machine() -> Offer:
    """What this machine offers to a command that computes by itself, without Ray."""
    here = machine.this_machine()
    return Offer((Nodes(here.cpus, machine.gpus()),), local=True, memory=here.memory)


class CannotHold(UsageError):
    """The cluster has not what a plan needs, and its autoscaler cannot add it."""


class Waiting:
    """Logs every half minute what is waited for. `without`: the option that would do without GPUs."""

    def __init__(self, plan: Plan, without: str, at_once: bool = False):
        self._plan, self._without = plan, without
        self._began = time.monotonic()
        self._said = -math.inf if at_once else self._began

    def say(self) -> None:
        """A line, if it is time for one."""
        now = time.monotonic()
        if now - self._said >= _LINE_SECONDS:
            self._said = now
            state = _state(self._plan, self._without)
            logger.info("waiting %.0f s for %s: %s", now - self._began, _words(self._plan), state)


def wait_for(plan: Plan, without: str) -> None:
    """Waits until the connected cluster can hold the first workers of `plan`; an autoscaler starts nodes for them.

    `without`: see `Waiting`. Raises CannotHold where the cluster has not enough, and nothing can add it.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    there = offer()
    if there.local:
        return
    group = placement_group([plan.bundle] * plan.fewest)
    fits = replace(there, growth=()).holds(plan.cpus, plan.gpus) >= plan.fewest  # once other work has ended
    waiting = Waiting(plan, without, at_once=True)
    try:
        while not group.wait(_POLL_SECONDS):
            if not fits and autoscaler.refuses(group):
                raise CannotHold(f"this cluster cannot hold {_words(plan)}: {_state(plan, without)}")
            waiting.say()
    finally:
        remove_placement_group(group)


def gpu_memory(plan: Plan) -> int:
    """Bytes of the smallest GPU among those that the first workers of `plan` may get; 0 = unknown."""
    if offer().local:
        return machine.gpu_memory()
    import ray

    asked = ray.remote(num_cpus=0, num_gpus=plan.gpus)(machine.gpu_memory)
    return min(ray.get([asked.remote() for _ in range(plan.fewest)]))


def _words(plan: Plan) -> str:
    return f"{plan.fewest} x {{{', '.join(f'{kind} {amount:g}' for kind, amount in plan.bundle.items())}}}"


def _state(plan: Plan, without: str) -> str:
    import ray

    free = ray.available_resources()
    there = "free: " + ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in plan.bundle)
    return "; ".join(filter(None, [there, autoscaler.coming(), without if plan.gpus else ""]))


def is_named() -> bool:
    """Whether `RAY_ADDRESS` names a cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


def is_local() -> bool:
    """Whether the whole cluster is this machine and nothing joined it from outside."""
    hosts = {node["NodeManagerHostname"] for node in nodes() if node["Alive"]}
    return not is_named() and hosts == {socket.gethostname()}


@contextmanager
def scratch(uri: str, name: str) -> Iterator[tuple[str, Any]]:
    """A folder below `uri` as (path, pyarrow file system), removed with all it holds on leaving."""
    from pyarrow import fs

    storage = open_storage(uri).child(name)
    remote = storage.uri.startswith("s3://")
    try:
        yield storage.uri.removeprefix("s3://"), _arrow_s3() if remote else fs.LocalFileSystem()
    finally:
        with waiting.cleaning(f"what Ray Train left in {storage.uri}"):
            storage.delete_all()


def _arrow_s3() -> Any:
    """Pyarrow's S3, set up from the same AWS variables as ours, without the empty objects that mark folders, parents
    included."""
    from pyarrow import fs

    class Unmarked(fs.S3FileSystem):
        def create_dir(self, path: str, *, recursive: bool = True) -> None:
            pass

        def __reduce__(self) -> Any:
            return _arrow_s3, ()

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return Unmarked(region=region, endpoint_override=endpoint.rstrip("/") or None)
