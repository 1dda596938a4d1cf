"""Claims: a small file in an output names the process that writes there and holds the time of its last heartbeat.

Several runs of the shards job may write into one output, each with a claim in a folder of its own. A training or an
evaluation has its output to itself (`held`): every change of its claim is a conditional put, so of two commands that
want the place one gets it, and one that finds another command there writes nothing more.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

from deedsr.dataset.manifest import STATE
from deedsr.errors import DeeDSRError, UsageError
from pipelines import machine
from pipelines.storage import Conflict, Storage, waiting
from pipelines.storage.errors import FAILURES

logger = logging.getLogger(__name__)
CLAIM = "claim.json"  # of a command that alone writes an output, in it
RUNS = f"{STATE}/runs"  # folder with a claim of every other command that works on an output
DEAD_AFTER = timedelta(minutes=10)  # without a heartbeat
_HEARTBEAT = 30.0  # seconds
_LAST_BEAT = 5.0  # seconds that the end waits for a beat that hangs in a storage
_END_SECONDS = 10.0  # that the end of a command waits for storage


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
    """Whether its process had a heartbeat in the last ten minutes and is not known to have died since."""
    if time.time() - claim.get("alive", 0.0) >= DEAD_AFTER.total_seconds():
        return False
    if claim.get("processes") != machine.process_space():  # another machine, or a container beside this one
        return True
    return machine.runs(claim["pid"], since=claim["alive"])


def found(out: Storage) -> Iterator[tuple[str, dict[str, Any]]]:
    """The claims on `out` with their locations; {} for one that is damaged."""
    for path in [CLAIM, *(entry.path for entry in out.list(RUNS) if entry.path.endswith(f"/{CLAIM}"))]:
        with suppress(FileNotFoundError):  # it ended meanwhile
            yield f"{out.uri}/{path}", parsed(out.read(path))


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
                except FAILURES as error:  # logged here, because workers that meet the same failure do not log
                    logger.warning("%s; the work waits, for %.0f s at most", error, waiting.limit())
                except DeeDSRError:  # the next heartbeat is another attempt
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


class Superseded(DeeDSRError):
    """Another command, or a later group of its workers, has taken this one's place."""


@dataclass
class Claim:
    """A command's claim on its output. Pickles: workers have one of their own."""

    doing: ClassVar[str] = "written"  # to the output, in messages

    out: Storage
    command: str = field(default_factory=lambda: uuid.uuid4().hex)
    lost: bool = False  # found to be another's, by a change

    def take(self) -> None:
        """Raises UsageError while a living command holds the place."""
        while True:
            found, version = self._read()
            if found and not found.get("ended") and is_alive(found):
                raise UsageError(
                    f"{self.out.uri} is being {self.doing} by {named(found)}: wait for it, end it there (`kill "
                    f"{found['pid']}`; the same command continues it), or choose another --out. One that was killed on "
                    f"another machine counts as alive for ten minutes: delete {self.out.uri}/{CLAIM} to continue it at "
                    "once"
                )
            claim = of_this_process() | {"command": self.command, "attempt": found.get("attempt", 0) + 1}
            with suppress(Conflict):
                self._write(claim, version)
                return

    def beat(self) -> None:
        self._change(lambda found: found | {"alive": time.time()})

    def end(self, refused: bool = False) -> None:
        """Releases the place. `refused`: nothing was done, so a first claim is removed."""
        found, _ = self._read()
        if refused and self._is_own(found) and found["attempt"] == 1:
            self.out.delete(CLAIM)
        else:
            self._change(lambda found: found | {"ended": True})

    def holds(self) -> bool:
        """Whether the place is still this one's."""
        return self._is_own(self._read()[0])

    def check(self) -> None:
        """Raises Superseded where it is not."""
        found, _ = self._read()
        if not self._is_own(found):
            raise self._superseded(found)

    def _is_own(self, found: dict[str, Any]) -> bool:
        return found.get("command") == self.command

    def _superseded(self, found: dict[str, Any]) -> Superseded:
        if not found:
            return Superseded(
                f"{self.out.uri}/{CLAIM} is not there for {socket.gethostname()}: it was removed, or is on another "
                "machine's disk; give an --out that all nodes share, or an s3:// location"
            )
        return Superseded(f"{named(found)} works in {self.out.uri} in place of this command, which ends")

    def _change(self, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        while True:
            found, version = self._read()
            if not self._is_own(found):
                self.lost = True
                raise self._superseded(found)
            with suppress(Conflict):
                return self._write(changed(found), version)

    def _read(self) -> tuple[dict[str, Any], str | None]:
        """What is there and its version: {} and None for nothing; an unreadable one counts as free."""
        try:
            # Before the content, which may only be newer: then a write over this version fails.
            version = self.out.stat(CLAIM).version
            return parsed(self.out.read(CLAIM), command=str, attempt=int), version
        except FileNotFoundError:
            return {}, None

    def _write(self, claim: dict[str, Any], version: str | None) -> dict[str, Any]:
        self.out.write(CLAIM, json.dumps(claim).encode(), expected=version)
        return claim


Held = TypeVar("Held", bound=Claim)


@contextmanager
def held(claim: Held) -> Iterator[Held]:
    """Holds the place until the context is left. Raises UsageError while another command holds it."""
    claim.take()
    refused = False
    try:
        with heartbeat(claim.beat):
            yield claim
    except UsageError:
        refused = True
        raise
    finally:
        # Another's by now, or the storage is away: the heartbeat stops anyway.
        with suppress(DeeDSRError), waiting.within(_END_SECONDS):
            claim.end(refused)
