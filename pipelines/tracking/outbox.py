"""Metrics on their way to the store: kept until it has taken them, sent once, in order, from a thread of its own."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

SEND_SECONDS = 5.0  # between two deliveries, and between two tries while the store is away
MAX_BATCH = 1000  # metrics that MLflow's stores take at once
MAX_ERRANDS = 64  # pictures and the like that wait for a store; the oldest go first

_log = logging.getLogger("deedsr.tracking")


class Point(NamedTuple):
    """One number of one step; a plain list of them is what checkpoints hold."""

    name: str
    value: float
    timestamp: int  # ms since 1970
    step: int


class Outbox:
    """What was logged and not taken yet.

    For each metric, steps up to the last one that the store holds are left out, and so is what is already waiting.
    Batches go one after the other, so a stored step has no gap below it. After a batch that failed, whose answer may
    have been lost alone, the store is asked anew what it holds.

    Args:
        send: brings a batch of points to the store, all or nothing.
        stored: the last step that the store holds, by metric.
        name: of the store, in messages.
        permit: asked before each delivery whether this process may still send; once it is False, all that waits is
            dropped and nothing is taken any more.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Point]], None],
        stored: Callable[[], dict[str, int]],
        name: str,
        permit: Callable[[], bool] = lambda: True,
    ):
        self._send, self._ask, self._name, self._permit = send, stored, name, permit
        self._points: list[Point] = []
        self._errands: list[Callable[[], object]] = []
        self._queued: dict[str, int] = {}  # last step, by metric, that ever waited here
        self._stored: dict[str, int] | None = None
        self._delivering = threading.Lock()
        self._changed = threading.Condition()  # guards all that is above
        self._wake = threading.Event()
        self._closed = False
        self._dismissed = False
        self._failures = 0
        self.away = False  # the last delivery failed
        self._sender: threading.Thread | None = None

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Queue numbers of one step. Returns at once."""
        now = int(time.time() * 1000)
        self.load(Point(name, float(value), now, step) for name, value in values.items())

    def load(self, points: Iterable[Sequence]) -> None:
        """Queue points as `unsent` of another outbox gave them."""
        with self._changed:
            if self._dismissed:
                return
            for point in sorted((Point(*p) for p in points), key=lambda p: p.step):
                if point.step > self._queued.get(point.name, -1):
                    self._queued[point.name] = point.step
                    self._points.append(point)
        self._start()

    def errand(self, call: Callable[[], object]) -> None:
        """Queue something else to do with the store, once, behind the metrics. Returns at once."""
        with self._changed:
            if self._dismissed:
                return
            self._errands.append(call)
            dropped = len(self._errands) - MAX_ERRANDS
            if dropped > 0:
                del self._errands[:dropped]
                _log.warning("%s is away for long: the oldest waiting picture is dropped", self._name)
        self._start()
        if not self.away:
            self._wake.set()

    def unsent(self) -> list[list]:
        """The points that the store has not acknowledged, as plain lists, oldest first."""
        with self._changed:
            return [list(point) for point in self._points]

    def last_step(self, prefix: str) -> int:
        """The last step of the metrics with this prefix, here or in the store; -1 for none. Asks the store once."""
        if self._stored is None:
            self._stored = self._ask()
        with self._changed:
            return max((s for n, s in (self._stored | self._queued).items() if n.startswith(prefix)), default=-1)

    def deliver(self) -> None:
        """Send everything now. What `send` raises comes through; what it did not take stays."""
        with self._delivering:
            while self._points and self._may_send():
                if self._stored is None:
                    self._stored = self._ask()
                batch = self._points[:MAX_BATCH]
                fresh = [p for p in batch if p.step > self._stored.get(p.name, -1)]
                if fresh:
                    try:
                        self._send(fresh)
                    except BaseException:
                        self._stored = None
                        raise
                with self._changed:
                    self._stored |= {p.name: p.step for p in fresh}
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

    def _may_send(self) -> bool:
        if self._permit():
            return True
        with self._changed:
            self._dismissed = True
            self._points.clear()
            self._errands.clear()
        _log.warning("another process writes this run to %s now: this one sends nothing more", self._name)
        return False

    def attempt(self, seconds: float) -> bool:
        """Have the thread send everything and wait for it: until it is done, until a try failed, or so long."""
        with self._changed:
            failures = self._failures
            self._wake.set()
            self._changed.wait_for(lambda: self._empty() or self._failures != failures, seconds)
            return self._empty()

    def drain(self, seconds: float) -> bool:
        """Try again and again for so long; True when everything is sent."""
        deadline = time.monotonic() + seconds
        while not self.attempt(max(0.0, deadline - time.monotonic())):
            if time.monotonic() > deadline - 1:
                return False
            time.sleep(1)
        return True

    def close(self) -> None:
        """Stop the thread after what it is doing; a request that hangs is not waited for long."""
        self._closed = True
        self._wake.set()
        if self._sender is not None:
            self._sender.join(SEND_SECONDS)

    def _empty(self) -> bool:
        return not self._points and not self._errands

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
                self.deliver()
            except Exception as error:  # whatever an artifact store's client raises: the thread must live on
                if not self.away:
                    _log.warning("%s: kept and sent later; the work goes on", error)
                self.away = True
            else:
                if self.away:
                    _log.warning("%s is back: what waited for it is sent", self._name)
                self.away = False
            with self._changed:
                self._failures += self.away
                self._changed.notify_all()
