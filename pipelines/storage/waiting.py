"""Retries while storage is unreachable, full or not permitted, with one time limit for all commands.

`DEEDSR_STORAGE_SECONDS` (600) is the limit, from the first failure on. A wait is logged every half minute, and ends
with the command.
"""

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from deedsr.errors import DeeDSRError
from pipelines import machine
from pipelines.storage.errors import Faulty, Full, Refused

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
VARIABLE = "DEEDSR_STORAGE_SECONDS"
_LINE_SECONDS = 30.0
_UNSAID_SECONDS = 5.0  # requests to a busy S3 fail now and then: shorter failures are not logged
_LONGEST_PAUSE = 10.0
_CLEANING_SECONDS = 10.0
_ATTEMPT_SECONDS = 60.0  # longest time between two failures: a pause, a connection and a read that time out

_failed = -math.inf  # time of the last failure that is retried
interrupted = threading.Event()  # the command was asked to end: no more retries


class _Bounds(NamedTuple):
    seconds: float = math.inf
    over: threading.Event = interrupted
    say: Callable[[str], object] = logger.warning


_UNBOUNDED = _Bounds()
_bounds: ContextVar[_Bounds] = ContextVar("bounds", default=_UNBOUNDED)


def fails() -> bool:
    """Whether a call of this process is being retried."""
    return time.monotonic() - _failed < _ATTEMPT_SECONDS


def limit() -> float:
    """Seconds that a failure may last. Raises UsageError if the variable holds no number."""
    return min(machine.environment_number(VARIABLE, 600.0, "seconds"), _bounds.get().seconds)


@contextmanager
def within(
    seconds: float = math.inf, over: threading.Event | None = None, say: Callable[[str], object] | None = None
) -> Iterator[None]:
    """Limits the retries of this thread to `seconds`, and until `over` is set; `say` gets the log lines."""
    before = _bounds.get()
    token = _bounds.set(_Bounds(min(seconds, before.seconds), over or before.over, say or before.say))
    try:
        yield
    finally:
        _bounds.reset(token)


@contextmanager
def cleaning(what: str) -> Iterator[None]:
    """For cleaning up at the end: a short limit, and a failure is logged, so that it replaces no other error."""
    try:
        with within(_CLEANING_SECONDS):
            yield
    except DeeDSRError as error:
        logger.warning("%s stays: %s", what, error)


class Wait:
    """Retries of one call, from its first failure on. `at_once`: the first failure is logged as well."""

    def __init__(self, at_once: bool = False):
        self._bounds, self._limit = _bounds.get(), limit()
        self._began = time.monotonic()
        self._next_line = self._began + (0 if at_once else _UNSAID_SECONDS)
        self._longest = 0.1

    def pause(self, failure: object) -> float | None:
        """Seconds until the next attempt; None to give up."""
        global _failed
        now = time.monotonic()
        left = self._limit - (now - self._began)
        if left <= 0 or self._bounds.over.is_set() or interrupted.is_set():
            return None
        _failed = now
        if now >= self._next_line:
            self._next_line = now + _LINE_SECONDS
            self._bounds.say(f"{failure}; tried again for {left:.0f} s more ({VARIABLE})")
        self._longest = min(2 * self._longest, _LONGEST_PAUSE)
        return min(self._longest * random.uniform(0.5, 1), left)

    def sleep(self, failure: object) -> bool:
        """Sleeps until the next attempt; False to give up."""
        pause = self.pause(failure)
        return pause is not None and not self._bounds.over.wait(pause)


def patiently(call: Callable[..., Result], *values: Any, **named: Any) -> Result:
    """Calls with these arguments, again while a disk is full, a right is missing or a file system fails.

    Requests that S3 does not answer are retried one by one in `pipelines.storage.s3`.
    """
    wait: Wait | None = None
    while True:
        try:
            return call(*values, **named)
        except (Full, Refused, Faulty) as error:
            wait = wait or Wait(at_once=True)
            if not wait.sleep(error):
                raise
