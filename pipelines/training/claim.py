"""One command at a time trains into an `--out`, and one of its worker groups writes there and to MLflow.

`OUT/claim.json` names the command that holds the place and counts attempts: each command and each group of workers
takes the next number. Every change is a conditional put, so of two that want the same number one gets it. Whoever finds
another command or another number there has been replaced, and writes nothing more.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from deedsr.errors import DeeDSRError, UsageError
from pipelines import claims
from pipelines.claims import CLAIM
from pipelines.storage import Conflict, Storage, waiting

__all__ = ["Claim", "Superseded", "held"]
_END_SECONDS = 10.0  # that the end of a command waits for storage


class Superseded(DeeDSRError):
    """Another command, or a later group of workers, has taken this one's place."""


@dataclass
class Claim:
    """What a command and its workers know of their claim. Pickles: every worker has one of its own."""

    out: Storage
    command: str  # a random name
    attempt: int = 0  # the group of workers; 0 = the command, whichever of its groups is at work
    run_id: str = ""  # MLflow run that is trained
    lost: bool = False  # found to be another's, by a change

    def take(self) -> None:
        """Raises UsageError while a living command holds the place."""
        while True:
            found, version = self._read()
            if found and not found.get("ended") and claims.is_alive(found):
                raise UsageError(
                    f"{self.out.uri} is being trained by {claims.named(found)}: wait for it, end it there (`kill "
                    f"{found['pid']}` has it checkpoint), or choose another --out. One that was killed on another "
                    f"machine counts as alive for ten minutes: delete {self.out.uri}/{CLAIM} to continue it at once"
                )
            claim = claims.of_this_process() | {"command": self.command, "attempt": found.get("attempt", 0) + 1}
            with suppress(Conflict):
                self._write(claim, version)
                return

    def next_attempt(self) -> None:
        """For a new group of workers. Raises Superseded where the place is another command's."""
        self.attempt = 0
        self.attempt = self._change(lambda found: found | {"attempt": found["attempt"] + 1})["attempt"]

    def beat(self) -> None:
        self._change(lambda found: found | {"alive": time.time()})

    def end(self) -> None:
        """Leave the place to whoever comes next."""
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
        return found.get("command") == self.command and self.attempt in (0, found["attempt"])

    def _superseded(self, found: dict[str, Any]) -> Superseded:
        if not found:
            return Superseded(f"{self.out.uri}/{CLAIM} was removed: this training has no place there any more")
        if found["command"] == self.command:
            return Superseded(f"other workers train into {self.out.uri} in place of these")
        return Superseded(f"{claims.named(found)} trains into {self.out.uri} in place of this command, which ends")

    def _change(self, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        while True:
            found, version = self._read()
            if not self._is_own(found):
                self.lost = True
                raise self._superseded(found)
            with suppress(Conflict):
                return self._write(changed(found), version)

    def _read(self) -> tuple[dict[str, Any], str | None]:
        """What is there and its version: {} and None for nothing; one that cannot be read is nobody's."""
        try:
            # Before the content, which may only be newer: then a write over this version fails.
            version = self.out.stat(CLAIM).version
            return claims.parsed(self.out.read(CLAIM), command=str, attempt=int), version
        except FileNotFoundError:
            return {}, None

    def _write(self, claim: dict[str, Any], version: str | None) -> dict[str, Any]:
        self.out.write(CLAIM, json.dumps(claim).encode(), expected=version)
        return claim


@contextmanager
def held(out: Storage) -> Iterator[Claim]:
    """The claim of this command on `out`, until the context is left. Raises UsageError while another one holds it."""
    claim = Claim(out, uuid.uuid4().hex)
    claim.take()
    try:
        with claims.heartbeat(claim.beat):
            yield claim
    finally:
        # Another's by now, or the storage is away: the heartbeat stops anyway.
        with suppress(DeeDSRError), waiting.within(_END_SECONDS):
            claim.end()
