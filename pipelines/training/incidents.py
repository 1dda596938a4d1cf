"""Detects optimizer steps with a non-finite or anomalously high loss or gradient, and records the skipped ones."""

import json
import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor

from deedsr.errors import DeeDSRError
from pipelines.storage import Storage, waiting

logger = logging.getLogger(__name__)
WINDOW = 100  # losses that a new one is compared with
FEWEST = 20  # of them before a spike can be told
MOST_IN_A_ROW = 10  # skipped steps: by then it is the run that is broken, not the batch


class LossWindow:
    """The losses of the last steps taken. Part of a checkpoint, so that a continued run judges alike.

    `sigma`: a loss so many standard deviations above the window's mean is a spike; 0 = none is.
    """

    def __init__(self, sigma: float):
        self.sigma = sigma
        self.losses: list[float] = []
        self.skipped = 0  # in all
        self.in_a_row = 0

    def objection(self, loss: float) -> str | None:
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


class Records:
    """Writes the records of skipped steps on a thread, so that storage that is away stops no step.

    What fails is tried again for as long as `pipelines.storage.waiting` says, then left out with a warning: no record
    ends a run.
    `check` is called before each write and raises where nothing may be written any more. Used as a context; leaving it
    by an exception gives up what is still tried.
    """

    def __init__(self, out: Storage, check: Callable[[], object] = lambda: None):
        self.out, self._check = out, check
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="incidents")
        self._last: Future[None] | None = None
        self._given_up = threading.Event()

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is not None:
            self._given_up.set()
        self._pool.shutdown(wait=kind is None)
