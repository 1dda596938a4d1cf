"""Who works on a place: a small file there names the process and holds the time of its last sign of life.

Runs of the shards job and trainings have one; what follows from a claim is theirs to say.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from deedsr.errors import DeeDSRError
from pipelines import machine
from pipelines.storage import waiting
from pipelines.storage.errors import FAILURES

__all__ = ["CLAIM", "DEAD_AFTER", "heartbeat", "is_alive", "named", "of_this_process", "parsed"]

logger = logging.getLogger(__name__)
CLAIM = "claim.json"
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


def parsed(data: bytes, **more: type) -> dict[str, Any]:
    """A claim as it was written, with the fields `more`; {} where it is none, as damaged and foreign files are."""
    try:
        claim = json.loads(data)
    except ValueError:
        return {}
    fields = {"host": str, "pid": int, "alive": float, **more}
    whole = isinstance(claim, dict) and all(isinstance(claim.get(name), kind) for name, kind in fields.items())
    return claim if whole else {}


def is_alive(claim: Mapping[str, Any]) -> bool:
    """Whether its process gave a sign of life in the last ten minutes and is not known to have died since."""
    if time.time() - claim.get("alive", 0.0) >= DEAD_AFTER.total_seconds():
        return False
    if claim.get("processes") != machine.process_space():  # another machine, or a container beside this one
        return True
    return machine.runs(claim["pid"], since=claim["alive"])


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
