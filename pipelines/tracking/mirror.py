"""Sends what a run logs to the MLflow store, in order and once, on a thread of its own."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from deedsr.errors import DeeDSRError

SEND_SECONDS = 5.0  # between two deliveries, and between two tries while the store is away
MAX_BATCH = 1000  # metrics that MLflow's stores take at once
SYSTEM = "system/"  # prefix of the machine's metrics, which count their own steps
MAX_ERRANDS = 64  # pictures and the like that wait for a store; the oldest go first

_log = logging.getLogger("deedsr.tracking")


class Point(NamedTuple):
    """One number of one step."""

    name: str
    value: float
    timestamp: int  # ms since 1970
    step: int


class StoreRefused(DeeDSRError):
    """The store answered with an error, or not at all, to something that was to be logged."""


class NeverTaken(StoreRefused):
    """The store will not take this, however often it is sent."""


Recorded = Callable[[Mapping[str, int]], Iterable[Point]]


class Mirror(ABC):
    """Points and errands on their way to the store.

    For each metric, steps up to the last one that the store holds are left out. Batches go one after the other, so a
    stored step has no gap below it; points that the store will never take are left out with a warning. After a batch
    that failed, whose answer alone may have been lost, the store is asked anew what it holds.

    Args:
        name: of the store, in messages.
        permit: asked before each delivery whether this process may still send; once it is False, the mirror is closed
            and all that waits is dropped.
    """

    def __init__(self, name: str, permit: Callable[[], bool]):
        self._name, self._permit = name, permit
        self._points: list[Point] = []
        self._errands: list[Callable[[], object]] = []
        self._recorded: Recorded | None = None
        self._stored: dict[str, int] | None = None
        self._delivering = threading.Lock()
        self._changed = threading.Condition()  # guards all that is above
        self._wake = threading.Event()
        self._closed = False  # nothing is taken any more
        self._failures = 0
        self._away = False  # the last delivery failed
        self._sender: threading.Thread | None = None

    @abstractmethod
    def _send(self, points: Sequence[Point]) -> None:
        """Bring a batch to the store, all or nothing. Raises NeverTaken where trying again is of no use."""

    @abstractmethod
    def _stored_steps(self) -> dict[str, int]:
        """The last step that the store holds, by metric."""

    def _add(self, points: Iterable[Point]) -> None:
        with self._changed:
            if not self._closed:
                self._points += points
        self._start()

    def replay(self, recorded: Recorded) -> None:
        """Send what earlier processes logged and the store lacks, before anything else. Returns at once.

        `recorded` gets the last step that the store holds, by metric, and gives at least the points behind these.
        """
        self._recorded = recorded
        self._start()

    def later(self, call: Callable[[], object]) -> None:
        """Do something with the store, once, when it is there, behind the metrics, on the sender's thread. Returns at
        once."""
        with self._changed:
            if self._closed:
                return
            self._errands.append(call)
            dropped = len(self._errands) - MAX_ERRANDS
            if dropped > 0:
                del self._errands[:dropped]
                _log.warning("%s is away for long: the oldest waiting picture is dropped", self._name)
        self._start()
        if not self._away:
            self._wake.set()

    def _last_step(self, prefix: str) -> int:
        """The last step that the store holds of the metrics with this prefix; -1 for none."""
        return max((step for name, step in self._known().items() if name.startswith(prefix)), default=-1)

    def flush(self) -> None:
        """Send what is pending now. Raises DeeDSRError where the store did not take it, which stays pending then."""
        with self._delivering:
            while (self._points or self._recorded) and self._may_send():
                self._take_recorded()
                batch = self._points[:MAX_BATCH]
                fresh = [p for p in batch if p.step > self._known().get(p.name, -1)]
                try:
                    self._send_valid(fresh)
                except BaseException:
                    self._stored = None
                    raise
                with self._changed:
                    self._known().update((p.name, p.step) for p in fresh)
                    del self._points[: len(batch)]
            refused: Exception | None = None
            for errand in list(self._errands):  # one that cannot be done holds up no other
                if not self._may_send():
                    return
                try:
                    errand()
                except Exception as error:
                    refused = refused or error
                    continue
                with self._changed:
                    if errand in self._errands:  # else it was dropped meanwhile
                        self._errands.remove(errand)
            if refused is not None:
                raise refused

    def _known(self) -> dict[str, int]:
        if self._stored is None:
            self._stored = self._stored_steps()
        return self._stored

    def _take_recorded(self) -> None:
        if self._recorded is None:
            return
        recorded = list(self._recorded(self._known()))
        with self._changed:
            points = {(p.name, p.step): p for p in [*recorded, *self._points]}
            self._points = sorted(points.values(), key=lambda p: p.step)
            self._recorded = None

    def _send_valid(self, points: Sequence[Point], refused: bool = False) -> None:
        """Send a batch; where the store will never take it, its halves, and in the end all but the points at fault.

        `refused`: this one point was refused before, as it might have been for what had passed when it was explained.
        """
        if not points:
            return
        try:
            self._send(points)
        except NeverTaken as error:
            middle = len(points) // 2
            if middle:
                self._send_valid(points[:middle])
                self._send_valid(points[middle:])
            elif not refused:
                self._send_valid(points, refused=True)
            else:
                _log.warning("%s at step %d is left out: %s", points[0].name, points[0].step, error)

    def _may_send(self) -> bool:
        if self._permit():
            return True
        with self._changed:
            self._closed = True
            self._recorded = None
            self._points.clear()
            self._errands.clear()
        _log.warning("another process writes this run to %s now: this one sends nothing more", self._name)
        return False

    def _drain(self, seconds: float, again: bool) -> bool:
        """Have the thread send everything, in one try or `again` and again, and wait so long; True when all is sent."""
        deadline = time.monotonic() + seconds
        while True:
            with self._changed:
                failures = self._failures
                self._wake.set()
                tried = lambda before=failures: self._empty() or self._failures != before
                self._changed.wait_for(tried, max(0.0, deadline - time.monotonic()))
                if self._empty():
                    return True
            if not again or time.monotonic() > deadline - 1:
                return False
            time.sleep(1)

    def _stop(self) -> None:
        """Stop the thread after what it is doing; a request that hangs is not waited for long."""
        self._closed = True
        self._wake.set()
        if self._sender is not None:
            self._sender.join(SEND_SECONDS)

    def _empty(self) -> bool:
        return not (self._points or self._errands or self._recorded)

    def _start(self) -> None:
        if self._sender is None and not self._closed:
            self._sender = threading.Thread(target=self._send_regularly, name="mlflow-metrics", daemon=True)
            self._sender.start()

    def _send_regularly(self) -> None:
        while not self._closed:
            self._wake.wait(SEND_SECONDS)
            self._wake.clear()
            if self._closed:
                return
            try:
                self.flush()
            except Exception as error:  # whatever an artifact store's client raises: the thread must live on
                if not self._away:
                    _log.warning("%s: kept and sent later; the work goes on", error)
                self._away = True
            else:
                if self._away:
                    _log.warning("%s is back: what waited for it is sent", self._name)
                self._away = False
            with self._changed:
                self._failures += self._away
                self._changed.notify_all()
