"""Workers that wait for storage to read from it: no hang, for as long as storage is waited for."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

from pipelines.storage import waiting
from pipelines.training.interruption import Stop
from pipelines.training.watchdog import Watchdog

__all__ = ["BlockedReads"]

logger = logging.getLogger(__name__)
_KEY = "deedsr/blocked-reads"
_LONGEST_PERIOD = 5.0  # seconds
_LINE_SECONDS = 30.0


class BlockedReads:
    """Extends the watchdog of every worker while one of them is `reading` and its storage does not answer.

    The others wait for that one in a collective and cannot know, so a counter in `store`, the process group's, goes up
    meanwhile. Rank 0 says so every half minute, and ends its process once it is `asked` to end: there is no step to
    checkpoint after. Used as a context around the loop, in which a thread of it looks ten times within the limit.
    """

    def __init__(self, watchdog: Watchdog, store: Any, rank: int, asked: Callable[[], Stop], say: Callable[[str], Any]):
        self._watchdog, self._store, self._rank, self._asked, self._say = watchdog, store, rank, asked, say
        self._reading = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="blocked-reads", daemon=True)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around a wait of the loop for something that is read from storage."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def __enter__(self) -> Self:
        if self._watchdog.seconds:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _look(self) -> None:
        seen, said = 0, -_LINE_SECONDS
        with suppress(RuntimeError):  # the store ends with rank 0
            while not self._over.wait(min(_LONGEST_PERIOD, self._watchdog.seconds / 10)):
                blocked = self._store.add(_KEY, int(self._reading and waiting.fails()))
                if blocked == seen:
                    continue
                seen = blocked
                self._watchdog.extend()
                if self._rank:
                    continue
                if time.monotonic() - said >= _LINE_SECONDS:
                    said = time.monotonic()
                    self._say("workers wait for storage, which their reads get no answer from; training goes on then")
                if self._asked() is Stop.END:
                    logger.warning("ended while storage was away")
                    os._exit(1)
