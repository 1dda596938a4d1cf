"""Networks, batches and options of what `benchmarks.gpu` measures.

`size` is `tiny` (the shipped model) or `full` (Stable Diffusion 2.1-base's layout with random weights, in `work`).
"""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.full_size import HR, SCALE
from deedsr.dataset.manifest import LatentsSource
from pipelines.training.adapter_stage import AdapterStage
from pipelines.training.config import (
    AdapterModelOptions,
    AdapterOptions,
    ContrastOptions,
    DiffusionOptions,
    LearnerModelOptions,
    LearnerOptions,
    TrainOptions,
)
from pipelines.training.learner_stage import LearnerStage
from pipelines.training.schedules import PRESETS

DEVICE = os.environ.get("DS_ACCELERATOR", "cpu")  # as DeepSpeed reads it
Size = Literal["tiny", "full"]
Stage = AdapterStage | LearnerStage
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR = HR // SCALE
LATENTS = {"tiny": LatentsSource("", "", "", "", "fp32", 4, 4), "full": LatentsSource("", "", "", "", "fp32", 8, 4)}
CELLS = {"tiny": 16, "full": HR // 8}  # of a latent, a side


def process_group() -> None:
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.update(alone | {"MASTER_PORT": str(29000 + os.getpid() % 2000)})
    torch.distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo")


def stage_of(kind: str, size: Size, work: str, train: TrainOptions, latents: bool = True) -> Stage:
    preset = PRESETS[kind]["tiny" if size == "tiny" else "paper"]
    if kind == "learner":
        block = preset["contrast"]["batch_block"]
        contrast = ContrastOptions(**preset["contrast"] | {"batch_block": min(block, train.global_batch_size)})
        return LearnerStage(
            LearnerOptions(model=LearnerModelOptions(**preset["model"]), contrast=contrast, train=train)
        )
    places = {"base": "tiny", "learner": "tiny"}
    if size == "full":
        places = {name: f"{work}/{name}" for name in places}
    options = AdapterOptions(
        **places, model=AdapterModelOptions(**preset["model"]), diffusion=DiffusionOptions(), train=train
    )
    return AdapterStage(options, SCALE, LATENTS[size] if latents else None)


def batch_of(stage: Stage, size: Size, micro: int, number: int, latents: bool = True) -> dict[str, Tensor]:
    """Random, the same on every device."""
    rng = torch.Generator().manual_seed(number)
    normal = lambda *shape: torch.randn(shape, generator=rng)
    uniform = lambda *shape: torch.rand(shape, generator=rng)
    batch: dict[str, Tensor]
    if isinstance(stage, LearnerStage):
        side = 48 if size == "tiny" else LR // 2
        batch = {"query": uniform(micro, 3, side, side), "key": uniform(micro, 3, side, side)}
        batch |= {"source": torch.arange(micro) + micro * number, "group": torch.full((micro,), -1)}
    else:
        cells = CELLS[size]
        batch = {"timestep": torch.randint(1000, (micro,), generator=rng), "guidance": torch.zeros(micro)}
        batch |= {"noise": normal(micro, stage.latent_channels, cells, cells)}
        if latents:
            width = 128 if size == "tiny" else 1024
            batch |= {"z_lr": normal(*batch["noise"].shape), "degradation": normal(micro, width)}
            batch |= {"z_hr": batch["z_lr"] + 0.3 * normal(*batch["noise"].shape)}
        else:
            pixels = cells * stage.vae_factor
            lr = uniform(micro, 3, pixels // SCALE, pixels // SCALE)
            batch |= {"lr": lr, "lr_crop": lr, "hr_crop": uniform(micro, 3, pixels, pixels)}
            batch |= {"encoding_noise": normal(micro, 2, *batch["noise"].shape[1:])}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def train_options(asked: dict[str, Any], **more: Any) -> TrainOptions:
    kind = asked.get("stage", "adapter")
    rate = {"optimizer": "sgd", "lr": 0.01} if kind == "learner" and asked["size"] == "full" else {"lr": 1e-4}
    values = {
        "global_batch_size": asked["micro"],
        "precision": asked.get("precision", "fp32"),
        "zero_stage": asked.get("zero", 0),
        "clip_grad_norm": 1.0,
        "ema_decay": 0.999,
        "exact_sums": False,
        "gradient_checkpointing": asked.get("checkpointing", False),
        "compile": asked.get("compile", False),
    }
    return TrainOptions(**rate | values | more)


def pipeline_of(size: Size, work: str, precision: str) -> Any:
    from deedsr import DeeDSRPipeline
    from deedsr.adapter import DegradationAwareAdapter
    from deedsr.hub.model_folder import BASE_PARTS, load_part
    from deedsr.sampling.schedule import ddim

    dtype = DTYPES[precision]
    if size == "tiny":
        pipe = DeeDSRPipeline.from_pretrained("tiny", torch_dtype=dtype)
    else:
        base = Path(work) / "base"
        vae, unet, scheduler = (load_part(base, part, torch_dtype=dtype) for part in BASE_PARTS)
        torch.manual_seed(0)
        adapter = DegradationAwareAdapter.for_unet(unet).eval().to(dtype)
        pipe = DeeDSRPipeline(vae, unet, ddim(scheduler), load_part(Path(work) / "learner", "learner"), adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(DEVICE)
