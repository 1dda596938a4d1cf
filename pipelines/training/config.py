"""Typed options of both stages. A preset of `schedules.py` fills in what the user leaves out."""

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from deedsr.errors import UsageError

Ablation = Literal["vector", "global", "local", "da"]  # as the adapter knows them


@dataclass
class TrainOptions:
    """What both stages share."""

    lr: float = 1e-4  # peak learning rate
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up
    schedule_steps: int | None = None  # at which the cosine ends; null = the max_steps that the run began with
    warmup_steps: int = 0  # linear warm-up
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: momentum 0.9
    weight_decay: float = 0.01  # of AdamW or SGD
    clip_grad_norm: float = 0.0  # 0 = off
    max_steps: int = 1000  # optimizer steps in all
    global_batch_size: int = 32  # samples per optimizer step, over all workers and accumulation
    micro_batch_size: int | None = None  # samples per forward on one worker; null = all it gets
    num_workers: int | str = "auto"  # auto = the most that the batch divides over; a number; a range such as 1..4
    zero_stage: Literal[0, 1, 2, 3] = 0  # DeepSpeed ZeRO
    precision: Literal["fp32", "bf16"] = "fp32"  # of forwards; weights, gradients and what adds up stay fp32
    exact_sums: bool = True  # gradients add up in float64: the same on any number of workers, for 8 bytes a weight
    seed: int = 0  # of initial weights, order of samples and every draw
    checkpoint_every: int = 200  # optimizer steps
    keep_checkpoints: int = 2  # the newest stay
    best_metric: str | None = None  # a logged metric, such as loss (here: mean of 100 steps): the best one stays too
    best_mode: Literal["min", "max"] = "min"  # whether a lower best_metric is better
    spike_sigma: float = 0.0  # a loss so many sigma above the last 100 is a spike; 0 = only NaN and infinity are
    on_spike: Literal["skip", "stop"] = "skip"  # a step with a spike, NaN or infinity is not taken, or ends the run
    hang_seconds: float = 60.0  # a worker without progress dies and is restarted; 0 = off
    cache_gb: float = 20.0  # of remote shards that a node keeps copies of, fetched ahead of need; 0 = none
    loader_threads: int | None = None  # that read and decode, for each worker; null = cpus_per_worker, 2 to 8
    log_every: int = 10  # optimizer steps between points of the curves
    validate_every: int = 0  # optimizer steps between validations; 0 = off
    validation_samples: int = 32  # pairs of the validation split, always the same
    validation_pictures: int = 2  # of them that the adapter enlarges each time
    gradient_checkpointing: bool = False  # activations are computed twice instead of held: less memory, more time
    compile: bool = False  # by torch.compile: minutes at every start, then faster steps; not with zero_stage 3
    ema_decay: float = 0.0  # averaged weights are the ones exported; 0 = off
    max_failures: int = 3  # restarts of the worker group before the run gives up; -1 = never
    cpus_per_worker: float | None = None  # reserved for a worker; null = all that there are for it
    compute_threads: int | None = None  # on CPUs, of each worker; null = 1 with exact_sums, else cpus_per_worker
    gpus_per_worker: float | None = None  # 0 or 1; null = 1, and 0 on a single machine without a GPU


@dataclass
class ContrastOptions:
    """Momentum contrast (docs/method.md, stage 1)."""

    queue_size: int = 24576  # past keys that serve as negatives
    momentum: float = 0.999  # of the key encoder, per optimizer step
    temperature: float = 0.07  # of the contrastive loss
    batch_block: int = 32  # consecutive samples of the global batch that stay in one forward; see MomentumContrast
    batch_negatives: bool = False  # keys of the other samples of the block are negatives too


@dataclass
class LearnerModelOptions:
    """Degradation learner; the defaults are the paper's 85 M parameter ResNet."""

    preset: Literal["paper", "tiny"] = "paper"  # size of the network
    norm_group: int = 16  # samples that share batch-norm statistics; divides contrast.batch_block
    statistics: list[int] | None = None  # layers on statistics of the picture; [] = none, null = the preset's


@dataclass
class LearnerOptions:
    """`deedsr train learner`"""

    data: str = ""  # degradation shards
    out: str = ""  # checkpoints and the trained learner
    init: str | None = None  # start from the weights of this learner or model, of the same geometry; null = new ones
    model: LearnerModelOptions = field(default_factory=LearnerModelOptions)
    contrast: ContrastOptions = field(default_factory=ContrastOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    experiment: str = "deedsr-learner"  # MLflow experiment
    register_as: str | None = "deedsr-learner"  # name of the model in MLflow's registry; null = not registered


@dataclass
class AdapterModelOptions:
    """Degradation-aware adapter; its geometry follows the base's UNet."""

    preset: Literal["paper", "tiny"] = "paper"  # size of the encoder and the branches
    tokens: Literal["new_kv", "project"] = "new_kv"  # global branch: new to_k/to_v, or tokens projected to the base's
    ablate: list[Ablation] = field(default_factory=list)  # left out: the learner's vector, a branch, the DA blocks


@dataclass
class DiffusionOptions:
    """Objective of stage 2."""

    lr_crop: int = 0  # LR pixels per side that the denoiser trains on, cut when reading; 0 = the whole LR
    timestep_power: float = 1.0  # timestep = T * u ** power, u uniform; above 1 trains low noise more often
    max_timestep: int | None = None  # T above: train below it, where guided sampling asks the UNet; null = all
    noise_guidance: float = 0.0  # strength that half of the noisy latents are pulled to the LR with, the others less
    snr_gamma: float = 0.0  # cap on the weight of low noise, min(SNR, gamma) on the clean latent; 0 = off


@dataclass
class AdapterOptions:
    """`deedsr train adapter`"""

    data: str = ""  # degradation shards
    learner: str = ""  # output of `deedsr train learner`: folder, URI or models:/NAME/VERSION
    base: str = "tiny"  # frozen diffusion model: `tiny`, a diffusers folder or URI, or a hub id
    out: str = ""  # checkpoints and the trained model folder
    init: str | None = None  # start from the weights of this model's adapter, of the same geometry; null = new ones
    model: AdapterModelOptions = field(default_factory=AdapterModelOptions)
    diffusion: DiffusionOptions = field(default_factory=DiffusionOptions)
    sampling: dict[str, Any] = field(default_factory=dict)  # sampling defaults stored with the model
    license: str = "other"  # of the trained weights, for LICENSE and model card: an SPDX name such as apache-2.0
    train: TrainOptions = field(default_factory=TrainOptions)
    experiment: str = "deedsr-adapter"  # MLflow experiment
    register_as: str | None = "deedsr-adapter"  # name of the model in MLflow's registry; null = not registered


def worker_range(num_workers: int | str) -> tuple[int, int] | None:
    """(fewest, most) workers of `4` or `1..4`; None for `auto`, which placement decides."""
    if num_workers == "auto":
        return None
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(num_workers))
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UsageError(
            f"train.num_workers must be auto, a number such as 2 or a range such as 1..4, got {num_workers!r}"
        )
    return low, high


def check(options: LearnerOptions | AdapterOptions) -> None:
    """Refuse values that no run could work with, naming key, value and what is accepted."""
    train = options.train
    for name in (
        "max_steps",
        "global_batch_size",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "validation_samples",
    ):
        if getattr(train, name) < 1:
            raise UsageError(f"train.{name} must be 1 or more, got {getattr(train, name)}")
    if not (math.isfinite(train.lr) and train.lr > 0):
        raise UsageError(f"train.lr must be a positive number, got {train.lr}")
    if not 0 <= train.ema_decay < 1:
        raise UsageError(f"train.ema_decay must be in [0, 1), got {train.ema_decay}")
    if train.schedule_steps is not None and (
        train.schedule == "constant" or train.schedule_steps <= train.warmup_steps
    ):
        raise UsageError(
            "train.schedule_steps is the length of train.schedule cosine and must be above train.warmup_steps "
            f"({train.warmup_steps}), got {train.schedule_steps} with {train.schedule}"
        )
    not_negative = ("warmup_steps", "weight_decay", "clip_grad_norm", "spike_sigma",
                    "hang_seconds", "validate_every", "validation_pictures")  # fmt: skip
    for name in not_negative:
        if getattr(train, name) < 0:
            raise UsageError(f"train.{name} must be 0 or more, got {getattr(train, name)}")
    if train.max_failures < -1:
        raise UsageError(f"train.max_failures must be 0 or more, or -1 for no limit, got {train.max_failures}")
    if train.cache_gb < 0 or (train.loader_threads is not None and train.loader_threads < 1):
        raise UsageError(
            "train.cache_gb must be 0 or more and train.loader_threads 1 or more or null, got "
            f"{train.cache_gb} and {train.loader_threads}"
        )
    if train.cpus_per_worker is not None and train.cpus_per_worker <= 0:
        raise UsageError(f"train.cpus_per_worker must be above 0, got {train.cpus_per_worker}")
    if train.compute_threads is not None and train.compute_threads < 1:
        raise UsageError(f"train.compute_threads must be 1 or more, or null, got {train.compute_threads}")
    if train.gpus_per_worker not in (None, 0, 1):
        raise UsageError(
            f"train.gpus_per_worker must be 0 or 1, got {train.gpus_per_worker:g}: a worker is one process with one "
            "device, and NCCL refuses two processes on one GPU; use more or fewer workers with --train.num_workers"
        )
    if train.compile and train.zero_stage == 3:
        raise UsageError(
            "train.compile cannot see into zero_stage 3, which fetches weights as they are used: use 0 to 2"
        )
    model = options.register_as
    if model is not None and (not model.strip() or re.search(r"[/:]", model) or {"'", '"'} <= set(model)):
        raise UsageError(
            f"register_as must be a name that MLflow's registry takes, without / and :, and not with quotes of both "
            f"kinds, or null, got {model!r}"
        )
    if isinstance(options, LearnerOptions):
        contrast, group = options.contrast, options.model.norm_group
        if contrast.queue_size < 1 or not 0 <= contrast.momentum < 1 or contrast.temperature <= 0:
            raise UsageError(
                "contrast needs queue_size 1 or more, momentum in [0, 1) and temperature above 0, got "
                f"{contrast.queue_size}, {contrast.momentum}, {contrast.temperature}"
            )
        block = contrast.batch_block
        if contrast.batch_negatives and block == 1:
            raise UsageError(
                "contrast.batch_negatives has no negatives in a contrast.batch_block of 1 sample: give more"
            )
        if block < 1 or train.global_batch_size % block:
            raise UsageError(
                f"contrast.batch_block must divide train.global_batch_size ({train.global_batch_size}), got {block}"
            )
        if group < 1 or block % group:
            raise UsageError(f"model.norm_group must divide contrast.batch_block ({block}), got {group}")
        widths = options.model.statistics
        if widths is not None and (min(widths, default=1) < 1 or (not widths and options.model.preset == "tiny")):
            raise UsageError(
                "model.statistics must be widths of 1 or more, such as [512,512], and with preset tiny, which has no "
                f"convolutions, not empty; got {widths}"
            )
        _check_workers(train, block)
        return
    _check_workers(train, 1)
    if {"global", "local"} <= set(options.model.ablate):
        raise UsageError(
            "model.ablate global and local together leave nothing that tells the base of the LR image: leave out one"
        )
    diffusion = options.diffusion
    if diffusion.timestep_power <= 0 or diffusion.lr_crop < 0:
        raise UsageError("diffusion.timestep_power must be above 0 and diffusion.lr_crop 0 or more")
    if diffusion.max_timestep is not None and diffusion.max_timestep < 1:
        raise UsageError(f"diffusion.max_timestep must be 1 or more, got {diffusion.max_timestep}")
    if not 0 <= diffusion.noise_guidance <= 1 or diffusion.snr_gamma < 0:
        raise UsageError("diffusion.noise_guidance must be in [0, 1] and diffusion.snr_gamma 0 or more")


def _check_workers(train: TrainOptions, unit: int) -> None:
    if given := worker_range(train.num_workers):
        for workers in range(given[0], given[1] + 1):  # an elastic run may come to have any number between
            micro_batch(train, workers, unit)


def micro_batch(train: TrainOptions, world_size: int, unit: int = 1) -> tuple[int, int]:
    """(samples per forward, forwards per optimizer step) of one of `world_size` workers.

    `unit`: samples that must stay in one forward (batch-norm group, block of negatives).
    """
    share, rest = divmod(train.global_batch_size, world_size)
    micro = min(train.micro_batch_size or share, share)
    if rest or share % micro or micro % unit:
        raise UsageError(
            f"train.global_batch_size {train.global_batch_size} does not divide over {world_size} workers with "
            f"micro batches of {micro} samples" + (f" in units of {unit} (contrast.batch_block)" if unit > 1 else "")
        )
    return micro, share // micro


def from_resolved(kind: type, tree: dict[str, Any]) -> Any:
    """The inverse of `dataclasses.asdict`."""
    values = dict(tree)
    for item in fields(kind):
        if isinstance(item.default_factory, type) and item.default_factory is not dict and item.name in values:
            values[item.name] = item.default_factory(**values[item.name])
    return kind(**values)
