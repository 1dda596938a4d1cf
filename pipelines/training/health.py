"""What ends a training before its last step, or would: signals, anomalous losses, hangs, storage that does not answer.

`Stop` and the errors below it say how the loop was left. `LossWindow` detects a non-finite or spiking loss, `Records`
keeps the batch of a skipped step. `Watchdog` ends a worker that makes no progress, so that Ray Train starts the group
again; `BlockedReads` extends it while a worker waits for storage.
"""

import faulthandler
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from enum import Enum
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor

from deedsr.errors import DeeDSRError
from pipelines.storage import Storage, waiting
from pipelines.training.checkpoint import WriterThread

logger = logging.getLogger(__name__)
WINDOW = 100  # losses that a new one is compared with
FEWEST = 20  # of them before a loss can count as a spike
MOST_IN_A_ROW = 10  # skipped steps: by then it is the run that is broken, not the batch
FIRST_STEPS = 10  # times longer that the first step may take: networks are loaded, kernels compiled
SLOW_STEPS = 5  # times longer than the slowest step that a later one may take
_KEY = "deedsr/blocked-reads"
_LONGEST_PERIOD = 5.0  # seconds
_LINE_SECONDS = 30.0

_terminated = threading.Event()


class Stop(Enum):
    NO = ""
    MOVE = "move"  # this worker's machine goes away, or there is room for more: checkpoint, and go on elsewhere
    END = "end"  # whoever started the training wants it to end

    def __bool__(self) -> bool:
        return self is not Stop.NO


class Moved(DeeDSRError):
    """Checkpointed because a machine goes away or more are there; the worker group is to be started again."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(
            "the workers were told to end (SIGTERM to one, a drained node, or another number of workers): checkpointed "
            f"at step {step}"
        )


class Ended(DeeDSRError):
    """Checkpointed because the user wants the run to end."""

    def __init__(self, step: int):
        super().__init__(f"checkpointed at step {step}")


class Untrainable(DeeDSRError):
    """The loss says that going on is of no use; starting the workers again is not either."""


class Unwritable(DeeDSRError):
    """Storage did not take a checkpoint or the model for as long as it is waited for, or until the run was to end."""


def listen() -> None:
    """SIGTERM asks this worker to checkpoint; a second one ends it. Call it on the main thread."""
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: object) -> None:
        _terminated.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, handle)


def terminated() -> Stop:
    """MOVE once the worker had its SIGTERM."""
    return Stop.MOVE if _terminated.is_set() else Stop.NO


class LossWindow:
    """The losses of the last steps taken. Part of a checkpoint, so that a continued run judges alike.

    `sigma`: a loss so many standard deviations above the window's mean is a spike; 0 = none is.
    """

    def __init__(self, sigma: float):
        self.sigma = sigma
        self.losses: list[float] = []
        self.skipped = 0  # in all
        self.in_a_row = 0

    def anomaly(self, loss: float) -> str | None:
        """Why a step with this loss should not be taken, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not self.sigma or len(self.losses) < FEWEST:
            return None
        deviation, mean = torch.std_mean(torch.tensor(self.losses, dtype=torch.float64))
        limit = float(mean + self.sigma * deviation)
        if loss <= limit:
            return None
        return f"the loss is {loss:.6g}, above {limit:.6g} = mean + {self.sigma:g} sigma of the last {len(self.losses)}"

    def take(self, loss: float) -> None:
        self.losses = [*self.losses[1 - WINDOW :], loss]
        self.in_a_row = 0

    def skip(self) -> None:
        self.skipped += 1
        self.in_a_row += 1

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    def state(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.skipped, self.in_a_row])
        return {"losses": torch.tensor(self.losses, dtype=torch.float64), "counts": counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Of a checkpoint; one from before there was a window leaves it empty."""
        if state:
            self.losses = state["losses"].tolist()
            self.skipped, self.in_a_row = state["counts"].tolist()


class Records(WriterThread):
    """Writes the records of skipped steps on a thread, so that storage that is away stops no step.

    What fails is tried again for as long as `pipelines.storage.waiting` says, then left out with a warning: no record
    ends a run.
    `check` is called before each write and raises where nothing may be written any more.
    """

    def __init__(self, out: Storage, check: Callable[[], object] = lambda: None):
        super().__init__("incidents")
        self.out, self._check = out, check
        self._last: Future[None] | None = None

    def add(self, step: int, values: dict[str, Any], batch: dict[str, Tensor], rank: int) -> str:
        """Begin to write `incidents/step-XXXXXXXX.json` (rank 0) and this worker's part of the batch; returns where."""
        path = f"incidents/step-{step:08d}"
        files = {f"{path}-rank-{rank}.safetensors": save({k: t.detach().cpu().contiguous() for k, t in batch.items()})}
        if rank == 0:
            # As text: JSON knows neither NaN nor infinity.
            plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            files[f"{path}.json"] = json.dumps(plain, indent=1).encode()
        self._last = self._pool.submit(self._persist, step, files)
        return f"{self.out.uri}/{path}.json"

    def wait(self) -> None:
        """Until the records so far are written or given up."""
        if self._last is not None:
            self._last.result()

    def _persist(self, step: int, files: dict[str, bytes]) -> None:
        def write() -> None:
            for path, data in files.items():
                self._check()
                self.out.write(path, data)

        try:
            with waiting.within(over=self._given_up):
                waiting.patiently(write)
        except DeeDSRError as error:
            logger.warning("there is no record of step %d, which was not taken: %s", step, error)


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

    def allow(self, seconds: float) -> None:
        """What comes now, up to the next `beat`, is no step and may take `seconds` longer."""
        self._last = 0.0
        self._arm(self.seconds + seconds)

    def extend(self) -> None:
        """From another thread: the step at hand has reason to wait, and begins anew."""
        if time.monotonic() + self.seconds > self._ends:
            self.allow(0)

    def _arm(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        if self.seconds:
            faulthandler.dump_traceback_later(seconds, exit=True)

    def __enter__(self) -> Self:
        self._arm(FIRST_STEPS * self.seconds)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        faulthandler.cancel_dump_traceback_later()


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
