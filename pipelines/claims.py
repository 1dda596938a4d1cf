"""Who works on a place: a small file there names the process and holds the time of its last sign of life.

Runs of the shards job and trainings have one; what follows from a claim is theirs to say.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from deedsr.dataset.manifest import STATE
from deedsr.errors import DeeDSRError
from pipelines import machine
from pipelines.storage import Storage, waiting
from pipelines.storage.errors import FAILURES

__all__ = ["CLAIM", "DEAD_AFTER", "RUNS", "found", "heartbeat", "is_alive", "named", "of_this_process", "running"]

logger = logging.getLogger(__name__)
CLAIM = "claim.json"  # of a training, in its output
RUNS = f"{STATE}/runs"  # folder with a claim of every other command that works on an output
DEAD_AFTER = timedelta(minutes=10)  # without a sign of life
_HEARTBEAT = 30.0  # seconds
_LAST_BEAT = 5.0  # seconds that the end waits for a beat that hangs in a storage


def of_this_process() -> dict[str, Any]:
    """A claim as it is written now."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": machine.process_space(),
        "alive": time.time(),
    }


def is_alive(claim: Mapping[str, Any]) -> bool:
    """Whether its process gave a sign of life in the last ten minutes and is not known to have died since."""
    if time.time() - claim.get("alive", 0.0) >= DEAD_AFTER.total_seconds():
        return False
    if claim.get("processes") != machine.process_space():  # another machine, or a container beside this one
        return True
    return machine.runs(claim["pid"], since=claim["alive"])


def found(out: Storage) -> Iterator[dict[str, Any]]:
    """The claims on `out`."""
    for path in [CLAIM, *(entry.path for entry in out.list(RUNS) if entry.path.endswith(f"/{CLAIM}"))]:
        try:
            yield json.loads(out.read(path))
        except (FileNotFoundError, ValueError):  # it ended meanwhile; or is nobody's
            continue


def named(claim: Mapping[str, Any]) -> str:
    return f"{claim['host']} (process {claim['pid']})"


@contextmanager
def heartbeat(beat: Callable[[], object]) -> Iterator[None]:
    """Calls `beat` every half minute while the context lasts, on a thread."""
    over = threading.Event()

    def regularly() -> None:
        with waiting.within(over=over):
            while not over.wait(_HEARTBEAT):
                try:
                    beat()
                except FAILURES as error:  # workers meet the same storage, and nobody hears them
                    logger.warning("%s; the work waits, for %.0f s at most", error, waiting.limit())
                except DeeDSRError:  # the next beat tells again
                    continue

    heart = threading.Thread(target=regularly, daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join(_LAST_BEAT)


@contextmanager
def running(out: Storage) -> Iterator[Storage]:
    """The folder of a new run with its heartbeat, removed when the run ends; a killed run leaves it."""
    name = f"{RUNS}/{uuid.uuid4().hex[:12]}"
    folder = out.child(name)

    def claim() -> None:
        folder.write(CLAIM, json.dumps(of_this_process()).encode())

    claim()
    try:
        with heartbeat(claim):
            yield folder
    finally:
        with waiting.cleaning(f"what this run left in {folder.uri}"):
            out.delete_many([entry.path for entry in out.list(name)])
