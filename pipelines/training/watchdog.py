"""A worker that makes no progress says where it stands and dies, so that Ray Train starts the group again."""

import faulthandler
import time
from types import TracebackType
from typing import Self

FIRST_STEPS = 10  # times longer that the first step may take: networks are loaded, kernels compiled
SLOW_STEPS = 5  # times longer than the slowest step that a later one may take


class Watchdog:
    """Dies unless `beat` comes again within `seconds`, or within five times the slowest recent step if that is longer.

    Used as a context around the loop. The stacks of all threads go to stderr, then the process ends with status 1. The
    clock is a thread of the interpreter's own, which a Python that is stuck in a library does not stop. `seconds` 0:
    no watching.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._slowest, self._last, self._ends = 0.0, 0.0, 0.0

    def beat(self) -> None:
        """The loop has made a step."""
        now = time.monotonic()
        if self._last:
            self._slowest = max(0.9 * self._slowest, now - self._last)  # one slow step is forgotten after a while
        self._last = now
        self._arm(max(self.seconds, SLOW_STEPS * self._slowest))

    def patience(self, seconds: float) -> None:
        """What comes now, up to the next `beat`, is no step and may take `seconds` longer."""
        self._last = 0.0
        self._arm(self.seconds + seconds)

    def extend(self) -> None:
        """From another thread: the step at hand has reason to wait, and begins anew."""
        if time.monotonic() + self.seconds > self._ends:
            self.patience(0)

    def _arm(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        if self.seconds:
            faulthandler.dump_traceback_later(seconds, exit=True)

    def __enter__(self) -> Self:
        self._arm(FIRST_STEPS * self.seconds)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        faulthandler.cancel_dump_traceback_later()
