"""The pieces of one shard on several CPUs at a time: some made here, the others in nested Ray tasks, all in order.

Processes and not threads, because a fifth of the work holds Python's lock; tasks of Ray and not processes of our own,
because the CPUs may be on other nodes, and because Ray ends its processes with the job.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from deedsr.degradation.chain import prepare_worker
from deedsr.errors import DeeDSRError

if TYPE_CHECKING:
    from ray import ObjectRef

_AHEAD = 2  # pieces for each CPU that are in work or wait for an earlier one
_RETRIES = 1  # of a piece whose process dies; without any, Ray would kill the shard's own task where memory is short

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Piece], Result],
    pieces: Iterable[Piece],
    cpus: int,
    *,
    here: Callable[[Piece], Result] | None = None,
    guarded: Callable[[Piece], Result] | None = None,
) -> Iterator[Result]:
    """`function` of each piece, in order; `cpus` of them at a time: one in this process, the others in Ray tasks.

    Pieces are taken as they are needed. `here`: `function` for those that this process makes. Elsewhere a piece whose
    process dies, and dies again, is made by `guarded` instead; then its death is an error. Raises what `function`
    raises.
    """
    here = here or function
    if cpus == 1:
        yield from map(here, pieces)
        return
    queue = _Queue[Piece, Result](pieces, _AHEAD * cpus)
    elsewhere = _elsewhere(function, guarded)
    for _ in range(cpus - 1):
        threading.Thread(target=queue.work, args=(elsewhere,), daemon=True).start()
    try:
        yield from queue.results(here)
    finally:
        queue.close()


class _Queue(Generic[Piece, Result]):
    """Pieces to take, each by one thread, and their results in order; no piece is taken `ahead` places early."""

    def __init__(self, pieces: Iterable[Piece], ahead: int):
        self._pieces, self._ahead = enumerate(pieces), ahead
        self._changed = threading.Condition()
        self._made: dict[int, Result | Exception] = {}
        self._tasks: dict[int, ObjectRef] = {}  # of pieces that are made elsewhere
        self._taken = self._given = 0
        self._closed = False  # nothing more is to be taken

    def work(self, function: Callable[..., Result]) -> None:
        """Takes pieces and has them made until there are none. `function` tells `begun` of the Ray task of a piece."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._taken < self._given + self._ahead)
                taken = self._take()
            if taken is None:
                return
            number, piece = taken
            self._make(number, piece, partial(function, begun=partial(self._tasks.__setitem__, number)))

    def results(self, function: Callable[[Piece], Result]) -> Iterator[Result]:
        """Each result in its turn; until it is there, this thread makes pieces too."""
        while True:
            with self._changed:
                there = self._given in self._made
                taken = None if there or self._taken >= self._given + self._ahead else self._take()
                if not there and taken is None and self._given == self._taken:
                    return
            if taken is not None:
                self._make(*taken, function)
            elif not there:
                self._wait()
            else:
                with self._changed:
                    result = self._made.pop(self._given)
                    self._tasks.pop(self._given, None)
                    self._given += 1
                    self._changed.notify_all()
                if isinstance(result, Exception):
                    raise result
                yield result

    def _wait(self) -> None:
        """A moment for the next result, in `ray.wait`: while the main thread of a task waits there, its CPU is free for
        the tasks that it waits for. Waits of other threads free none, and shards could wait for each other for ever."""
        import ray

        if task := self._tasks.get(self._given):
            ray.wait([task], timeout=1.0)
        with self._changed:
            self._changed.wait_for(lambda: self._given in self._made, timeout=0.02)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take(self) -> tuple[int, Piece] | None:
        taken = None if self._closed else next(self._pieces, None)
        if taken is None:
            self._closed = True
            self._changed.notify_all()
        else:
            self._taken += 1
        return taken

    def _make(self, number: int, piece: Piece, function: Callable[[Piece], Result]) -> None:
        result: Result | Exception
        try:
            result = function(piece)
        except Exception as error:  # raised in its turn
            result = error
        with self._changed:
            self._made[number] = result
            self._changed.notify_all()


def _elsewhere(function: Callable[[Piece], Result], guarded: Callable[[Piece], Result] | None) -> Callable[..., Result]:
    """`function` in a Ray task of one CPU; takes a piece and `begun`, which gets the task."""
    import ray
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

    run = ray.remote(num_cpus=1, max_retries=_RETRIES)(_made)

    def made(piece: Piece, begun: Callable[[ObjectRef], None]) -> Result:
        def result_of(function: Callable[[Piece], Result]) -> Result | DeeDSRError:
            task = run.remote(function, piece)
            begun(task)
            return ray.get(task)

        try:
            result = result_of(function)
        except (NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError):
            if guarded is None:
                raise
            result = result_of(guarded)
        if isinstance(result, DeeDSRError):
            raise result
        return result

    return made


def _made(function: Callable[[Piece], Result], piece: Piece) -> Result | DeeDSRError:
    prepare_worker()
    try:
        return function(piece)
    except DeeDSRError as error:  # as a value: an exception would come back wrapped in Ray's traceback
        return error
