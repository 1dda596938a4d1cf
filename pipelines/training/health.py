"""Fault detection of a training: signals, anomalous losses, hangs, unreachable storage.

`Stop` and the errors below it are the ways in which the loop ends early. `LossWindow` detects a non-finite or spiking
loss. `Watchdog` ends a worker without progress, so that Ray Train restarts the group; `BlockedReads` extends its
timeout while a worker waits for storage.
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
from contextlib import contextmanager, suppress
from enum import Enum
from typing import TYPE_CHECKING, Any, Self

from deedsr.errors import DeeDSRError
from pipelines.storage import waiting

if TYPE_CHECKING:  # the actor of `supervision` imports this module, too: torch would take a second and 200 MB
    from torch import Tensor

logger = logging.getLogger(__name__)
WINDOW = 100  # losses that a new one is compared with
FEWEST = 20  # losses in the window before one can count as a spike
MOST_IN_A_ROW = 10  # consecutive skipped steps that end the run
FIRST_STEPS = 10  # factor on the timeout of the first step: networks are loaded, kernels compiled
SLOW_STEPS = 5  # timeout of a step as a multiple of the slowest recent one
_KEY = "deedsr/blocked-reads"
_LONGEST_PERIOD = 5.0  # seconds
_LINE_SECONDS = 30.0

_terminated = threading.Event()


class Stop(Enum):
    NO = ""
    MOVE = "move"  # node is preempted, or more workers fit: checkpoint and restart the group
    END = "end"  # the user ends the training

    def __bool__(self) -> bool:
        return self is not Stop.NO


class Moved(DeeDSRError):
    """Checkpointed before the worker group is restarted on other nodes or with another size."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(
            "the workers were told to end (SIGTERM to one, a drained node, or another number of workers): checkpointed "
            f"at step {step}"
        )


class Ended(DeeDSRError):
    """Checkpointed because the user ended the run."""

    def __init__(self, step: int):
        super().__init__(f"checkpointed at step {step}")


class Untrainable(DeeDSRError):
    """The loss is anomalous; a restart of the workers would not help."""


class Unwritable(DeeDSRError):
    """A checkpoint or the model could not be written before the retry limit or before the user ended the run."""


def listen() -> None:
    """On SIGTERM this worker checkpoints and stops; a second one kills it. Call it on the main thread."""
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: object) -> None:
        _terminated.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, handle)


def terminated() -> Stop:
    """MOVE after a SIGTERM."""
    return Stop.MOVE if _terminated.is_set() else Stop.NO


class LossWindow:
    """Losses of the last optimizer steps. Part of a checkpoint, so that a continued run detects the same spikes.

    `sigma`: a loss is a spike if it is so many standard deviations above the window's mean; 0 = no detection.
    """

    def __init__(self, sigma: float):
        self.sigma = sigma
        self.losses: list[float] = []
        self.skipped = 0  # in all
        self.in_a_row = 0

    def anomaly(self, loss: float) -> str | None:
        """Why a step with this loss is to be skipped, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not self.sigma or len(self.losses) < FEWEST:
            return None
        import torch

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

    def state(self) -> "dict[str, Tensor]":
        import torch

        counts = torch.tensor([self.skipped, self.in_a_row])
        return {"losses": torch.tensor(self.losses, dtype=torch.float64), "counts": counts}

    def load_state(self, state: "dict[str, Tensor]") -> None:
        """From a checkpoint; those of earlier versions have no window."""
        if state:
            self.losses = state["losses"].tolist()
            self.skipped, self.in_a_row = state["counts"].tolist()


def record_of_skipped(step: int, values: dict[str, Any], batch: "dict[str, Tensor]", rank: int) -> dict[str, bytes]:
    """Files by path: `incidents/step-XXXXXXXX.json` (rank 0) and this worker's part of the batch."""
    from safetensors.torch import save

    path = f"incidents/step-{step:08d}"
    files = {f"{path}-rank-{rank}.safetensors": save({k: t.detach().cpu().contiguous() for k, t in batch.items()})}
    if rank == 0:
        # As text: JSON knows neither NaN nor infinity.
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        files[f"{path}.json"] = json.dumps(plain, indent=1).encode()
    return files


class Watchdog:
    """Ends the process unless `beat` is called within `seconds`, or five times the slowest recent step if longer.

    A context around the loop. On timeout the stacks of all threads go to stderr and the process exits with status 1.
    The timer is a C thread of `faulthandler`, which also fires while Python is blocked in a library. `seconds` 0: off.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._slowest, self._last, self._ends = 0.0, 0.0, 0.0

    def beat(self) -> None:
        """Called once per step."""
        now = time.monotonic()
        if self._last:
            self._slowest = max(0.9 * self._slowest, now - self._last)  # one slow step is forgotten after a while
        self._last = now
        self._arm(max(self.seconds, SLOW_STEPS * self._slowest))

    def allow(self, seconds: float) -> None:
        """Extend the timeout by `seconds` until the next `beat`: for work outside of a step."""
        self._last = 0.0
        self._arm(self.seconds + seconds)

    def extend(self) -> None:
        """Restart the timeout of the current step, from another thread."""
        if time.monotonic() + self.seconds > self._ends:
            self.allow(0)

    def _arm(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        if self.seconds:
            faulthandler.dump_traceback_later(seconds, exit=True)

    def __enter__(self) -> Self:
        self._arm(FIRST_STEPS * self.seconds)
        return self

    def __exit__(self, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()


class BlockedReads:
    """Extends the watchdog of every worker while one of them is `reading` from storage that does not answer.

    The other workers wait for it in a collective. It increments a counter in `store` (of the process group), which a
    thread of every worker polls ten times per timeout. Rank 0 reports it every half minute, and exits once it is
    `asked` to end, since there is no finished step to checkpoint. A context around the loop.
    """

    def __init__(self, watchdog: Watchdog, store: Any, rank: int, asked: Callable[[], Stop], say: Callable[[str], Any]):
        self._watchdog, self._store, self._rank, self._asked, self._say = watchdog, store, rank, asked, say
        self._reading = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="blocked-reads", daemon=True)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Context of a read from storage by the loop."""
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
