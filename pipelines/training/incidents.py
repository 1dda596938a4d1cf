"""Steps whose loss or gradient cannot be trusted: how they are told, and what is kept of them."""

import json
import math
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pipelines.storage import Storage

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


def record(out: Storage, step: int, values: dict[str, Any], batch: dict[str, Tensor], rank: int) -> str:
    """Write `incidents/step-XXXXXXXX.json` (rank 0) and this worker's last micro-batch; returns where."""
    path = f"incidents/step-{step:08d}"
    out.write(f"{path}-rank-{rank}.safetensors", save({k: t.detach().cpu().contiguous() for k, t in batch.items()}))
    if rank == 0:
        # As text: JSON knows neither NaN nor infinity.
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        out.write(f"{path}.json", json.dumps(plain, indent=1).encode())
    return f"{out.uri}/{path}.json"
