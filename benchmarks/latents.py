"""Stage 2 on `deedsr latents` shards against pixel shards, and where the time goes at Stable Diffusion 2.1's size.

    python -m benchmarks.latents [--steps 200] [--warm-up 20] [--block 20] [--real-step]

Measured: optimizer steps of preset `tiny` on the shipped base with the real loader, one compute thread, arms in turns
of a block of steps in one process pinned to one core; each arm's processor time (loader threads included) and wall
time per step. Estimated: floating-point operations of one sample of 512 px, counted on the meta device: what trains,
and what latents spare. --real-step takes one real step of that size (batch 1, random weights; 15 GB of memory).
Prints tables and, last, one JSON line.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader import make_shards
from deedsr.degradation.chain import prepare_worker
from pipelines.data.dataset import Dataset
from pipelines.data.loader import Batch, micro_batches
from pipelines.data.order import SampleOrder
from pipelines.data.shard_cache import ShardCache
from pipelines.machine import allowed_cpus
from pipelines.models import Base, Learner
from pipelines.shards.encode import make_latents
from pipelines.training.adapter_stage import AdapterStage
from pipelines.training.config import (
    AdapterModelOptions,
    AdapterOptions,
    DiffusionOptions,
    TrainOptions,
)
from pipelines.training.schedules import PRESETS

GOAL = 1.5
# Stable Diffusion 2.1-base.
UNET = {
    "sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280], "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip


class Arm:
    """A training of stage 2 on one dataset, one optimizer step at a time."""

    def __init__(self, data: str, learner: str):
        preset = PRESETS["adapter"]["tiny"]
        train = TrainOptions(**preset["train"])
        options = AdapterOptions(
            data=data, learner=learner, base="tiny", model=AdapterModelOptions(preset="tiny"),
            diffusion=DiffusionOptions(**preset["diffusion"]), train=train,
        )  # fmt: skip
        dataset = Dataset.open(data)
        self.stage = AdapterStage(options, dataset.scale, dataset.manifest.latents)
        self.adapter = self.stage.build(torch.device("cpu"), torch.float32).train()
        trained = [p for p in self.adapter.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, train.lr)
        self.forwards = train.global_batch_size // (train.micro_batch_size or train.global_batch_size)
        self.batches = self._batches(dataset, train)
        self.wall = self.cpu = 0.0

    def _batches(self, dataset: Dataset, train: TrainOptions) -> Iterator[Batch]:
        dataset = replace(dataset, through=ShardCache(0).open)
        index = dataset.index("train")
        return micro_batches(
            SampleOrder(index, dataset.order_digest, 0, together=False),
            lambda epoch, row: self.stage.sample(dataset, index, row, epoch),
            first_step=0, last_step=10**6, global_batch=train.global_batch_size,
            micro=train.micro_batch_size or train.global_batch_size, world_size=1, rank=0, threads=1,
        )  # fmt: skip

    def run(self, steps: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            for _ in range(self.forwards):
                loss, _ = self.stage.loss(self.adapter, next(self.batches))
                (loss / self.forwards).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def measured(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        data = {"pixels": options.shards or make_shards(Path(work) / "pixels", "deedsr"), "latents": f"{work}/latents"}
        make_latents(data["pixels"], Base.find("tiny"), Learner.find("tiny"), data["latents"], progress=False)
        size = {name: sum(shard.bytes for shard in Dataset.open(uri).manifest.shards) for name, uri in data.items()}
        os.sched_setaffinity(0, {max(allowed_cpus())})
        torch.set_num_threads(1)
        prepare_worker()
        arms = {name: Arm(uri, "tiny") for name, uri in data.items()}
        for arm in arms.values():
            arm.run(options.warm_up)
            arm.wall = arm.cpu = 0.0
        for _ in range(options.steps // options.block):
            for arm in arms.values():
                arm.run(options.block)
    print(f"{'tiny':10}{'ms a step':>12}{'of one core':>14}{'MB of shards':>15}")
    for name, arm in arms.items():
        each = 1e3 / options.steps
        print(f"{name:10}{arm.wall * each:12.0f}{arm.cpu * each:14.0f}{size[name] / 1e6:15.1f}")
    wall, cpu = (getattr(arms["pixels"], t) / getattr(arms["latents"], t) for t in ("wall", "cpu"))
    print(f"latents are {wall:.2f} times as fast, {cpu:.2f} times by processor time (goal {GOAL})")
    return {"speedup": round(wall, 3), "speedup_of_processor_time": round(cpu, 3), "goal": GOAL}


def networks(device: str) -> tuple[Any, Any, Any, Any]:
    """UNet with adapter, VAE and learner at full size."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from deedsr.adapter.adapter import DegradationAwareAdapter, freeze
    from deedsr.learner.resnet import DegradationLearner
    from deedsr.presets import LEARNER_PRESETS

    with torch.device(device):
        unet = freeze(UNet2DConditionModel(**UNET))
        vae, learner = freeze(AutoencoderKL(**VAE)), freeze(DegradationLearner(**LEARNER_PRESETS["paper"]))
        adapter = DegradationAwareAdapter.for_unet(unet, "paper", learner.dim)
    adapter.attach(unet)
    return unet, vae, learner, adapter


def estimated() -> dict[str, Any]:
    """TFLOP of one sample of 512 px."""
    from torch.utils.flop_counter import FlopCounterMode

    _, vae, learner, adapter = networks("meta")
    image, lr, z = (torch.empty(1, c, s, s, device="meta") for c, s in ((3, 512), (3, 128), (4, 64)))
    counts: dict[str, float] = {}

    def count(name: str, work: Any) -> None:
        with FlopCounterMode(display=False) as counter:
            work()
        counts[name] = counter.get_total_flops() / 1e12

    def encode() -> None:
        with torch.no_grad():
            vae.encode(image)
            vae.encode(image)

    def vector() -> None:
        with torch.no_grad():
            learner(lr)

    t, vectors = torch.zeros(1, dtype=torch.long, device="meta"), torch.empty(1, learner.dim, device="meta")
    count("VAE, HR and LR", encode)
    count("learner", vector)
    count("UNet and adapter, forward and backward", lambda: adapter(z, t, z, vectors).sum().backward())
    trained = counts["UNet and adapter, forward and backward"]
    speedup = sum(counts.values()) / trained
    print(f"\n{'Stable Diffusion 2.1, paper, 512 px':42}{'TFLOP a sample':>16}")
    for name, value in counts.items():
        print(f"{name:42}{value:16.2f}")
    print(f"estimated speed-up on latents: {speedup:.2f}")
    return {"tflop": {name: round(value, 3) for name, value in counts.items()}, "estimated": round(speedup, 2)}


def real_step() -> dict[str, Any]:
    """Seconds of one step's parts on this machine, fp32, batch 1."""
    _, vae, learner, adapter = networks("cpu")
    image, lr, z = torch.rand(1, 3, 512, 512), torch.rand(1, 3, 128, 128), torch.randn(1, 4, 64, 64)
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    with torch.no_grad():
        vae.encode(image)
        vae.encode(image)
        seconds["VAE, HR and LR"] = time.perf_counter() - began
        vector = learner(lr)
    began = time.perf_counter()
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad])
    adapter(z, torch.tensor([500]), z, vector).square().mean().backward()
    optimizer.step()
    seconds["UNet and adapter, forward, backward, AdamW"] = time.perf_counter() - began
    print(f"\n{'one real step of that size':46}{'seconds':>8}")
    for name, value in seconds.items():
        print(f"{name:46}{value:8.1f}")
    return {"real_step_seconds": {name: round(value, 1) for name, value in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--block", type=int, default=20)
    parser.add_argument(
        "--shards", help="an existing dataset of 512 px crops; else one is made of the shipped photographs"
    )
    parser.add_argument("--real-step", action="store_true")
    options = parser.parse_args()
    result = measured(options) | estimated() | (real_step() if options.real_step else {})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
