"""The pieces of one shard on several CPUs at a time: nested Ray tasks whose results come back in order.

Processes and not threads, because a fifth of the work holds Python's lock; tasks of Ray and not processes of our own,
because the CPUs may be on other nodes, and because Ray ends its processes with the job.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from deedsr.dataset.worker import prepare_worker
from deedsr.errors import DeeDSRError

__all__ = ["in_order"]

_AHEAD = 2  # pieces for each CPU that are in work or wait for an earlier one
_RETRIES = 1  # of a piece whose process dies; without any, Ray would kill the shard's own task where memory is short

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Piece], Result],
    pieces: Iterable[Piece],
    cpus: int,
    guarded: Callable[[Piece], Result] | None = None,
) -> Iterator[Result]:
    """`function` of each piece, in order; `cpus` of them at a time, each in a Ray task of one CPU.

    Pieces are taken as they are needed. A piece whose process dies, and dies again, is made by `guarded` instead; then
    its death is an error. Raises what `function` raises.
    """
    if cpus == 1:
        yield from map(function, pieces)
        return
    import ray
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

    run = ray.remote(num_cpus=1, max_retries=_RETRIES)(_made)
    rest = iter(pieces)
    begun: deque[tuple[Any, Piece, bool]] = deque()  # its task, the piece, whether that task is of `guarded`
    while True:
        refs = [ref for ref, _, _ in begun]
        running = ray.wait(refs, num_returns=len(refs), timeout=0)[1] if refs else []
        while len(running) < cpus and len(begun) < _AHEAD * cpus:
            try:
                piece = next(rest)
            except StopIteration:
                break
            begun.append((run.remote(function, piece), piece, False))
            running.append(begun[-1][0])
        if not begun:
            return
        if begun[0][0] in running:
            # A finished piece further back is replaced by another one before the first is there.
            ray.wait(running, num_returns=1)
            continue
        ref, piece, again = begun.popleft()
        try:
            result = ray.get(ref)
        except (NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError):
            if guarded is None or again:
                raise
            begun.appendleft((run.remote(guarded, piece), piece, True))
            continue
        if isinstance(result, DeeDSRError):
            raise result
        yield result


def _made(function: Callable[[Piece], Result], piece: Piece) -> Result | DeeDSRError:
    prepare_worker()
    try:
        return function(piece)
    except DeeDSRError as error:  # as a value: an exception would come back wrapped in Ray's traceback
        return error
