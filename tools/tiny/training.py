"""A training in stages: it continues where it was stopped, on any device, for as many minutes as it is given."""

import copy
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deedsr.adapter.adapter import channels_last
from deedsr.errors import UsageError

SEED = 2404_00661
SAVE_SECONDS = 180
CURVE = 100  # steps that a point of the curve is the mean of


@dataclass(frozen=True)
class Budget:
    """Where a stage computes and for how long. It ends early after `minutes`, with its state saved."""

    device: torch.device
    minutes: float = math.inf
    batch_factor: int = 1  # batches are so many times as large as on a CPU

    @property
    def compiled(self) -> bool:
        return self.device.type == "cuda"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)


class Run:
    """Optimizers, learning rate, EMA, curve and checkpoint of one training.

        for step, rng in run:
            run.update("model", loss)
            run.log(loss=loss)

    Args:
        path: checkpoint; read if it exists.
        parts: trained modules by name; each has an optimizer of its own.
        averaged: names of the parts of which an EMA is kept.
    """

    def __init__(
        self,
        path: Path,
        parts: dict[str, torch.nn.Module],
        budget: Budget,
        *,
        steps: int,
        lr: float,
        averaged: tuple[str, ...],
        betas: tuple[float, float] = (0.9, 0.99),
        decay: float = 0.999,
        warmup: int = 200,
    ):
        self.path, self.parts, self.budget, self.steps, self.lr = path, parts, budget, steps, lr
        self.decay, self.warmup = decay, warmup
        for part in parts.values():
            channels_last(part, budget.device)
        self.ema = {name: copy.deepcopy(parts[name]).requires_grad_(False).eval() for name in averaged}
        self.optimizers = {
            name: torch.optim.AdamW(
                [p for p in part.parameters() if p.requires_grad], lr=lr, betas=betas, weight_decay=1e-4,
                fused=budget.compiled,
            )
            for name, part in parts.items()
        }  # fmt: skip
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self._sums: dict[str, Any] = defaultdict(float)
        self._summed = 0  # steps, since the last point of the curve or the start
        if path.exists():
            try:
                self._load(torch.load(path, weights_only=True, map_location=budget.device))
            except (RuntimeError, ValueError, KeyError) as error:  # other layers, other shapes, other optimizers
                raise UsageError(
                    f"{path} is the state of another network's training: move it away to begin anew"
                ) from error

    def __iter__(self) -> Iterator[tuple[int, np.random.Generator]]:
        """(step, its generator) of every step that is left and for which there is time."""
        began = saved = time.monotonic()
        bar = tqdm(total=self.steps, initial=self.step, smoothing=0.05, mininterval=10, desc=self.path.stem)
        while self.step < self.steps and time.monotonic() - began < 60 * self.budget.minutes:
            for optimizer in self.optimizers.values():
                optimizer.param_groups[0]["lr"] = self.learning_rate()
            torch.manual_seed(SEED + self.step)  # so that a run that was stopped goes on as if it had not been
            yield self.step, np.random.default_rng([SEED, self.step])
            self.step += 1
            self._summed += 1
            self._average()
            bar.update()
            if self.step % CURVE == 0:
                point = {name: round(float(total) / self._summed, 5) for name, total in self._sums.items()}
                self._sums.clear()
                self._summed = 0
                self.curve.append({"step": self.step} | point)
                bar.set_postfix(point, refresh=False)
                print(self.curve[-1], flush=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        bar.close()
        self.save()

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to 2 %."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        return self.lr * min(1, (self.step + 1) / self.warmup) * (0.02 + 0.98 * cosine)

    def update(self, name: str, loss: torch.Tensor, clip: float = 1.0) -> None:
        """One optimizer step of a part."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parts[name].parameters(), clip)
        optimizer.step()

    def log(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value.detach()

    @torch.no_grad()
    def _average(self) -> None:
        weight = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        for name, mean in self.ema.items():
            means: list[torch.Tensor] = [*mean.parameters()]
            values: list[torch.Tensor] = [*self.parts[name].parameters()]
            torch._foreach_lerp_(means, values, weight)

    def save(self) -> None:
        state = {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "ema": {name: mean.state_dict() for name, mean in self.ema.items()},
            "step": self.step,
            "curve": self.curve,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.path.with_suffix(".part"))
        os.replace(self.path.with_suffix(".part"), self.path)

    def _load(self, state: dict[str, Any]) -> None:
        for group, values in ((self.parts, "parts"), (self.optimizers, "optimizers"), (self.ema, "ema")):
            for name, member in group.items():  # type: ignore[attr-defined]
                member.load_state_dict(state[values][name])
        self.step, self.curve = state["step"], state["curve"]


def averaged_weights(path: Path, name: str) -> dict[str, torch.Tensor]:
    """EMA of a part in a checkpoint."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the stage {path.stem} first")
    return torch.load(path, weights_only=True, map_location="cpu")["ema"][name]


def steps_taken(path: Path) -> int:
    return torch.load(path, weights_only=True, map_location="cpu")["step"] if path.exists() else 0
