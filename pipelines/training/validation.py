"""Validation while a training runs: the same pairs, crops, timesteps and noises every time.

Nothing of the training changes by it: no weight, no statistic, no random number.
"""

import copy
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from deedsr.dataset.keys import generator
from deedsr.metrics import psnr_y
from pipelines.data.dataset import Dataset
from pipelines.data.loader import stacked
from pipelines.reports.page import picture_name, strip
from pipelines.training.engine import Engine
from pipelines.training.stage import Stage

if TYPE_CHECKING:
    from deedsr.sampling.pipeline import DeeDSRPipeline
    from pipelines.tracking import Run

DRAWS = -1  # the epoch whose draws validation takes; training counts from 0
SEED = 0  # of the draws, whatever the training's, so that runs are comparable
PICTURE_STEPS = 10  # sampling steps of a picture, at most


class Validation:
    """Every worker makes one and calls it alike.

    Its pairs are the `train.validation_samples` of the validation split whose keys have the smallest SHA-256.
    """

    def __init__(self, stage: Stage, dataset: Dataset, engine: Engine, micro: int):
        self.stage, self.dataset, self.engine, self.micro = stage, dataset, engine, micro
        self.plan = stage.options.train
        self.fixed = copy.copy(stage)
        self.fixed.options = replace(stage.options, train=replace(self.plan, seed=SEED))
        self.pipeline: DeeDSRPipeline | None = None
        self.rows: list[int] = []
        if self.plan.validate_every:
            self.index = dataset.index("validation")
            self.rows = fixed_rows(self.index["key"].to_pylist(), self.plan.validation_samples)

    def due(self, step: int) -> bool:
        """Whether this step ends with a validation."""
        return bool(self.rows) and step % self.plan.validate_every == 0

    def compute(self, step: int, run: "Run | None") -> dict[str, float]:
        """`validation/...` metrics, logged to `run`; a collective."""
        began = time.perf_counter()
        devices = [self.engine.device] if self.engine.device.type == "cuda" else []
        module = self.engine.module
        was_training = module.training
        with torch.no_grad(), torch.random.fork_rng(devices), averaged(self.engine):
            module.eval()
            try:
                values = {name: float(value) for name, value in self._numbers().items()}
                values |= self._pictures(step, run)
            finally:
                module.train(was_training)
        values["seconds"] = time.perf_counter() - began
        values = {f"validation/{name}": value for name, value in values.items()}
        if run is not None:
            run.log_metrics(values, step)
        return values

    def _numbers(self) -> dict[str, Tensor]:
        """Each worker computes an equal share of the pairs, the last ones repeated where they do not divide."""
        share = -(-len(self.rows) // self.engine.world_size)
        begin = self.engine.rank * share
        mine = [self.rows[min(i, len(self.rows) - 1)] for i in range(begin, begin + share)]
        parts = [self._rows(mine[i : i + self.micro]) for i in range(0, share, self.micro)]
        return self.stage.validation_metrics(self.engine.gather(torch.cat(parts))[: len(self.rows)])

    def _rows(self, rows: list[int]) -> Tensor:
        samples = [self.fixed.sample(self.dataset, self.index, row, DRAWS) for row in rows]
        batch = {name: t.to(self.engine.device) for name, t in stacked(samples).items()}
        return self.stage.validation_step(self.engine, batch)

    def _pictures(self, step: int, run: "Run | None") -> dict[str, float]:
        """Sampled pictures beside what they came from and should be; PSNR of Y, of them and of bicubic ones."""
        self.pipeline = self.pipeline or self.stage.pipeline()
        if self.pipeline is None or not self.plan.validation_pictures:
            return {}
        figures = []
        # Parameters that ZeRO 3 keeps in parts come together only where every worker asks for them.
        if self.engine.rank == 0 or self.engine.stage == 3:
            for row in self.rows[: self.plan.validation_pictures]:
                sample = self.dataset.read(self.index, row)
                bicubic = cv2.resize(sample.lr, sample.hr.shape[1::-1], interpolation=cv2.INTER_CUBIC)
                picture = sampled(self.pipeline, sample.key, sample.lr)
                figures.append([psnr_y(p, sample.hr) for p in (picture, bicubic)])
                if run is not None:
                    made = {"bicubic": bicubic, "model": picture, "HR": sample.hr}
                    source = sample.info["source"]["path"]
                    name = f"validation/{picture_name(source, sample.key)}"
                    run.log_picture(name, strip(source, sample.lr, made), step)
        torch.distributed.barrier()
        if not figures:
            return {}
        ours, bicubic = np.mean(figures, axis=0)
        return {"psnr_y": float(ours), "psnr_y_bicubic": float(bicubic)}


def sampled(pipeline: "DeeDSRPipeline", key: str, lr: np.ndarray) -> np.ndarray:
    """The picture of a pair, from the same noise each time."""
    noise = torch.Generator().manual_seed(int(generator("validation", key).integers(2**62)))
    steps = min(PICTURE_STEPS, pipeline.sampling.num_inference_steps)
    return np.asarray(pipeline(lr, generator=noise, num_inference_steps=steps).images[0])


def fixed_rows(keys: list[str], count: int) -> list[int]:
    """Rows of the `count` keys with the smallest hashes: they stay the same when the dataset grows elsewhere."""
    order = sorted(range(len(keys)), key=lambda row: hashlib.sha256(keys[row].encode()).digest())
    return order[:count]


@contextmanager
def averaged(engine: Engine) -> Iterator[None]:
    """The averaged weights, which are the ones exported, in place of the trained ones for a while; a collective.

    Where ZeRO 3 keeps the weights in parts, the trained ones stay.
    """
    if not engine.averaged or engine.stage == 3:
        yield
        return
    trained = [p.detach().clone() for _, p in engine.named]
    try:
        for (_, p), (_, average) in zip(engine.named, engine.averages(), strict=True):
            p.data.copy_(average)
        yield
    finally:
        for (_, p), value in zip(engine.named, trained, strict=True):
            p.data.copy_(value)
