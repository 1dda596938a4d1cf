"""Typed options of both stages. A preset of `schedules.py` fills in what the user leaves out."""

import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

from deedsr.errors import UsageError

Workers = Annotated[int | str, Field(union_mode="left_to_right")]  # "2" is the number
MicroBatch = PositiveInt | Literal["auto"] | None
Below1 = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
AUTO_SAMPLES = 8  # of `auto` on the smallest cards, where no block of the learner sets a size
Ablation = Literal["vector", "global", "local", "da"]  # as the adapter knows them


@dataclass
class TrainOptions:
    """What both stages share."""

    lr: Annotated[PositiveFloat, "peak learning rate"] = 1e-4
    schedule: Annotated[Literal["constant", "cosine"], "learning rate after the warm-up"] = "constant"
    schedule_steps: Annotated[int | None, "last step of the cosine; null = max_steps of the first command"] = None
    warmup_steps: Annotated[NonNegativeInt, "steps of linear warm-up"] = 0
    optimizer: Annotated[Literal["adamw", "sgd"], "sgd: momentum 0.9"] = "adamw"
    weight_decay: Annotated[NonNegativeFloat, "weight decay"] = 0.01
    clip_grad_norm: Annotated[NonNegativeFloat, "maximum gradient norm; 0 = off"] = 0.0
    max_steps: Annotated[PositiveInt, "optimizer steps in total"] = 1000
    global_batch_size: Annotated[PositiveInt, "samples per optimizer step, over all workers and accumulation"] = 32
    micro_batch_size: Annotated[MicroBatch, "samples per forward of a worker; auto = by GPU; null = its share"] = None
    num_workers: Annotated[Workers, "auto = most that the batch divides over; a number; a range such as 1..4"] = "auto"
    zero_stage: Annotated[Literal[0, 1, 2, 3], "DeepSpeed ZeRO"] = 0
    precision: Annotated[Literal["fp32", "bf16"], "forward precision; weights, gradients and sums stay fp32"] = "fp32"
    exact_sums: Annotated[bool | None, "fp64 gradient sums, equal for any number of workers; null = on CPUs"] = None
    tf32: Annotated[bool | None, "TF32 in fp32 products on GPUs; null = unless exact_sums"] = None
    seed: Annotated[int, "seed of initial weights, sample order and all random draws"] = 0
    checkpoint_every: Annotated[PositiveInt, "optimizer steps between checkpoints"] = 200
    keep_checkpoints: Annotated[PositiveInt, "number of newest checkpoints to keep"] = 2
    best_metric: Annotated[str | None, "also keep the best checkpoint by this metric, such as the mean loss"] = None
    best_mode: Annotated[Literal["min", "max"], "min: a lower best_metric is better"] = "min"
    spike_sigma: Annotated[NonNegativeFloat, "threshold above the mean of the last 100 losses; 0 = only NaN, inf"] = 0.0
    on_spike: Annotated[Literal["skip", "stop"], "skip the optimizer step, or end the run"] = "skip"
    hang_seconds: Annotated[NonNegativeFloat, "restart a worker after this time without progress; 0 = off"] = 60.0
    cache_gb: Annotated[NonNegativeFloat, "local cache of remote shards per node; 0 = off"] = 20.0
    loader_threads: Annotated[PositiveInt | None, "loader threads per worker; null = cpus_per_worker, 2 to 8"] = None
    log_every: Annotated[PositiveInt, "optimizer steps between logged metrics"] = 10
    validate_every: Annotated[NonNegativeInt, "optimizer steps between validations; 0 = off"] = 0
    validation_samples: Annotated[PositiveInt, "pairs of the validation split, the same in each validation"] = 32
    validation_pictures: Annotated[NonNegativeInt, "number of them that the adapter upscales and logs"] = 2
    gradient_checkpointing: Annotated[bool, "recompute activations in backward: less memory, more time"] = False
    compile: Annotated[bool, "use torch.compile: slower start, faster steps; not with zero_stage 3"] = False
    ema_decay: Annotated[Below1, "exponential moving average; its weights are exported; 0 = off"] = 0.0
    max_failures: Annotated[int, Field(ge=-1), "restarts of the worker group before the run fails; -1 = no limit"] = 3
    cpus_per_worker: Annotated[PositiveFloat | None, "CPUs reserved per worker; null = an equal share of all"] = None
    compute_threads: Annotated[PositiveInt | None, "CPU threads; null = cpus_per_worker, 1 with exact_sums"] = None
    gpus_per_worker: Annotated[float | None, "0 or 1; null = 1, or 0 on a single machine without a GPU"] = None


@dataclass
class ContrastOptions:
    """Momentum contrast (docs/method.md, stage 1)."""

    queue_size: Annotated[PositiveInt, "keys in the queue of negatives"] = 24576
    momentum: Annotated[Below1, "of the key encoder, per optimizer step"] = 0.999
    temperature: Annotated[PositiveFloat, "of the contrastive loss"] = 0.07
    batch_block: Annotated[PositiveInt, "consecutive samples that share one forward; see MomentumContrast"] = 32
    batch_negatives: Annotated[bool, "also use keys of the same block as negatives"] = False


@dataclass
class LearnerModelOptions:
    """Degradation learner; the defaults are the paper's 85 M parameter ResNet."""

    preset: Annotated[Literal["paper", "tiny"], "size of the network"] = "paper"
    norm_group: Annotated[PositiveInt, "samples that share batch-norm statistics; divides contrast.batch_block"] = 16
    statistics: Annotated[list[PositiveInt] | None, "widths of layers on image statistics; []: none; null = preset"] = (
        None
    )


@dataclass
class LearnerOptions:
    """`deedsr train learner`"""

    stage: ClassVar = "learner"

    data: Annotated[str, "degradation shards"] = ""
    out: Annotated[str, "checkpoints and the trained learner"] = ""
    init: Annotated[str | None, "initial weights: learner or model of the same geometry; null = random"] = None
    model: LearnerModelOptions = field(default_factory=LearnerModelOptions)
    contrast: ContrastOptions = field(default_factory=ContrastOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    experiment: Annotated[str, "MLflow experiment"] = "deedsr-learner"
    register_as: Annotated[str | None, "name in MLflow's model registry; null = not registered"] = "deedsr-learner"

    @property
    def unit(self) -> int:
        """Samples that must share a forward."""
        return self.contrast.batch_block


@dataclass
class AdapterModelOptions:
    """Degradation-aware adapter; its geometry follows the base's UNet."""

    preset: Annotated[Literal["paper", "tiny"], "size of the encoder and the branches"] = "paper"
    tokens: Annotated[Literal["new_kv", "project"], "global branch: new to_k/to_v or projected tokens"] = "new_kv"
    ablate: Annotated[list[Ablation], "parts of the method to leave out"] = field(default_factory=list)


@dataclass
class DiffusionOptions:
    """Objective of stage 2."""

    lr_crop: Annotated[NonNegativeInt, "LR pixels per side of the training crop; 0 = the whole LR"] = 0
    timestep_power: Annotated[PositiveFloat, "timestep = T * u ** power, u uniform; above 1 favours low noise"] = 1.0
    max_timestep: Annotated[PositiveInt | None, "T above; train only below it; null = all timesteps"] = None
    noise_guidance: Annotated[Share, "maximum blend of the LR latent into the noisy latent; 0 = off"] = 0.0
    snr_gamma: Annotated[NonNegativeFloat, "min-SNR weighting, min(SNR, gamma) on the clean latent; 0 = off"] = 0.0
    pictures: Annotated[bool, "compare the decoded picture with the HR instead of latents; data must be pixels"] = False

    def timesteps(self, steps: int) -> int:
        """Timesteps from 0 to below this one are trained. `steps`: of the base's schedule."""
        return min(self.max_timestep or steps, steps)


@dataclass
class AdapterOptions:
    """`deedsr train adapter`"""

    stage: ClassVar = "adapter"
    unit: ClassVar = 1

    data: Annotated[str, "degradation shards"] = ""
    learner: Annotated[str, "output of `deedsr train learner`: folder, URI or models:/NAME/VERSION"] = ""
    base: Annotated[str, "frozen diffusion model: `tiny`, a diffusers folder or URI, or a hub id"] = "tiny"
    out: Annotated[str, "checkpoints and the trained model folder"] = ""
    init: Annotated[str | None, "initial weights: model of the same geometry; null = random"] = None
    model: AdapterModelOptions = field(default_factory=AdapterModelOptions)
    diffusion: DiffusionOptions = field(default_factory=DiffusionOptions)
    sampling: Annotated[dict[str, Any], "sampling defaults stored with the model"] = field(default_factory=dict)
    license: Annotated[str, "license of the trained weights: an SPDX id such as apache-2.0"] = "other"
    train: TrainOptions = field(default_factory=TrainOptions)
    experiment: Annotated[str, "MLflow experiment"] = "deedsr-adapter"
    register_as: Annotated[str | None, "name in MLflow's model registry; null = not registered"] = "deedsr-adapter"


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
    _check_types(options)
    train = options.train
    # A run records the length that it took from max_steps.
    if train.schedule_steps not in (None, train.max_steps) and (
        train.schedule == "constant" or train.schedule_steps <= train.warmup_steps
    ):
        raise UsageError(
            "train.schedule_steps is the length of train.schedule cosine and must be above train.warmup_steps "
            f"({train.warmup_steps}), got {train.schedule_steps} with {train.schedule}"
        )
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
    if given := worker_range(train.num_workers):
        for workers in range(given[0], given[1] + 1):  # an elastic run may come to have any number between
            micro_batch(train, workers, options.unit)
    if isinstance(options, AdapterOptions):
        if {"global", "local"} <= set(options.model.ablate):
            raise UsageError(
                "model.ablate global and local together leave nothing that tells the base of the LR image: leave out "
                "one"
            )
        return
    block, group = options.contrast.batch_block, options.model.norm_group
    if options.contrast.batch_negatives and block == 1:
        raise UsageError("contrast.batch_negatives has no negatives in a contrast.batch_block of 1 sample: give more")
    if train.global_batch_size % block:
        raise UsageError(
            f"contrast.batch_block must divide train.global_batch_size ({train.global_batch_size}), got {block}"
        )
    if block % group:
        raise UsageError(f"model.norm_group must divide contrast.batch_block ({block}), got {group}")
    if options.model.statistics == [] and options.model.preset == "tiny":
        raise UsageError("model.statistics must not be empty with preset tiny, which has no convolutions: give widths")


def _check_types(options: LearnerOptions | AdapterOptions) -> None:
    kind: Any = tuple[type(options)]  # type: ignore[misc]  # a tuple: no configuration can stand beside a dataclass
    try:
        TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python([asdict(options)])
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if str(part).isidentifier())
        raise UsageError(f"{key}: {problem['msg']}, got {problem['input']!r}") from None


def micro_batch(train: TrainOptions, world_size: int, unit: int = 1) -> tuple[int, int]:
    """(samples per forward, forwards per optimizer step) of one of `world_size` workers.

    `unit`: samples that must stay in one forward (batch-norm group, block of negatives).
    """
    share, rest = divmod(train.global_batch_size, world_size)
    micro = min(asked_micro_batch(train, unit) or share, share)
    if rest or share % micro or micro % unit:
        raise UsageError(
            f"train.global_batch_size {train.global_batch_size} does not divide over {world_size} workers with "
            f"micro batches of {micro} samples" + (f" in units of {unit} (contrast.batch_block)" if unit > 1 else "")
        )
    return micro, share // micro


def asked_micro_batch(train: TrainOptions, unit: int) -> int | None:
    """`train.micro_batch_size`; where that is `auto`, what every card takes."""
    if train.micro_batch_size == "auto":
        return unit if unit > 1 else AUTO_SAMPLES
    return train.micro_batch_size
