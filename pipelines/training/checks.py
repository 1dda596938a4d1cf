"""Refuses a training that cannot work, before any worker starts: data that do not suit its stage, sizes that its
networks cannot take, a metric that is never logged. Warns of settings without an effect."""

import logging
import math
from difflib import get_close_matches
from pathlib import Path

import pyarrow.compute as pc

from deedsr.errors import UsageError
from deedsr.hub.model_folder import read_config
from pipelines.data.dataset import Dataset, no_validation
from pipelines.training.config import AdapterOptions, LearnerOptions
from pipelines.training.metrics import bucket_names, middles

logger = logging.getLogger(__name__)
_ALWAYS = {"loss", "loss_smoothed", "lr", "grad_norm", "skipped_steps", "samples_per_second", "data_wait_share"}
_MEMORY = {"memory/rss_mib", "memory/gpu_allocated_mib", "memory/gpu_peak_mib"}
_RANKS = {"top1", "top5"}


def check_learner_data(options: LearnerOptions, dataset: Dataset) -> None:
    """Refuse LR images without equal quadrants, and data in which no sample has a negative."""
    crop, scale = dataset.recipe.crop.size, dataset.scale
    if crop // scale % 2:
        raise UsageError(
            f"the LR images in {dataset.uri} have {crop // scale} px a side, and the learner compares their quadrants, "
            f"which needs an even number: make shards with a crop.size that is a multiple of {2 * scale}"
        )
    index, contrast = dataset.index("train"), options.contrast
    groups = index["degradation_group"]
    if groups.null_count == 0 and len(pc.unique(groups)) == 1:
        raise UsageError(
            f"all samples in {dataset.uri} share one degradation, so none is a negative of another and there is "
            "nothing to learn: make shards with a larger distinct_degradations, or 0, or with more variants"
        )
    in_the_block = contrast.batch_negatives and contrast.batch_block > 1 and index.num_rows > 1
    if len(pc.unique(index["source_sha256"])) == 1 and not in_the_block:
        raise UsageError(
            f"all samples in {dataset.uri} come from one photograph, whose keys in the queue are no negatives, so "
            "there is nothing to learn: add photographs, or take the other samples of a block as negatives by "
            "--contrast.batch_negatives true, which needs several variants and a batch_block above 1"
        )


def check_adapter_data(options: AdapterOptions, dataset: Dataset, base: Path, learner: Path) -> None:
    """Refuse crops that the base's networks cannot take, a learner without weights, unknown sampling settings."""
    from deedsr.hub.base import picture_unit
    from deedsr.hub.settings import SamplingSettings
    from deedsr.hub.weights import tensor_shapes

    crop, scale = dataset.recipe.crop.size, dataset.scale
    unit = picture_unit(base)  # of the HR
    lr_unit = unit // math.gcd(unit, scale)
    whole, wanted = crop // scale, options.diffusion.lr_crop
    side = min(wanted, whole) if wanted else whole
    if side % lr_unit:
        what = f"diffusion.lr_crop {wanted}" if side == wanted else f"the recipe's crop.size {crop} in {dataset.uri}"
        other = f"shards with a crop.size that is a multiple of {lr_unit * scale}"
        fitting = f"--diffusion.lr_crop {side - side % lr_unit} or another multiple of {lr_unit}"
        raise UsageError(
            f"{what} gives training pictures of {side * scale} px, and the base {options.base} takes multiples of "
            f"{lr_unit * scale}: give {fitting + ', or ' if side >= lr_unit else ''}{other}"
        )
    tensor_shapes(learner)
    try:
        SamplingSettings.of(options.sampling)
    except UsageError as error:
        raise UsageError(f"sampling: {error}") from None


def require_latents_of(dataset: Dataset, options: AdapterOptions, base: Path, learner: Path) -> None:
    """Refuse latents that were made by other networks than this training's, or where it compares pictures."""
    from deedsr.hub.weights import part_digest

    made_of = dataset.manifest.latents
    if made_of is None:
        return
    if options.diffusion.pictures:
        raise UsageError(f"diffusion.pictures compares pictures, and {dataset.uri} holds latents: give the shards")
    parts = {"base": (made_of.vae, base / "vae")}
    parts |= {"learner": (made_of.learner, learner)} if made_of.learner else {}
    differing = [
        f"--{name} {getattr(options, name)} ({'its VAE' if name == 'base' else 'it'} has digest {found:.12}, "
        f"theirs had {stored:.12})"
        for name, (stored, folder) in parts.items()
        if (found := part_digest(folder)) != stored
    ]
    if differing:
        raise UsageError(
            f"the latents in {dataset.uri} were not made with {' and not with '.join(differing)}: give what they were "
            f"made with, or make others by `deedsr latents`"
        )


def require_best_metric(options: LearnerOptions | AdapterOptions, dataset: Dataset, base: Path | None = None) -> None:
    """Raises UsageError for a `train.best_metric` that no checkpoint would hold. `base`: of the adapter."""
    train, wanted = options.train, options.train.best_metric
    if wanted is None:
        if train.best_mode != "min":
            raise UsageError(f"train.best_mode {train.best_mode} has no effect without train.best_metric: give both")
        return
    timesteps = 0
    if isinstance(options, AdapterOptions) and base:
        timesteps = options.diffusion.timesteps(int(read_config(base, "scheduler").get("num_train_timesteps", 1000)))
    validates = 0 < train.validate_every <= train.max_steps and dataset.index("validation").num_rows > 0
    pictures = dataset.manifest.latents is None and train.validation_pictures > 0
    logged = sorted(logged_metrics(options, timesteps, validates, pictures))
    if wanted in logged:
        return
    if wanted in logged_metrics(options, timesteps, validates=True, pictures=True):
        split = "a validation split and a train.validate_every from 1 to train.max_steps"
        needs = "pixels and train.validation_pictures" if validates else split
        raise UsageError(f"train.best_metric {wanted} is never logged: it needs {needs}")
    close = get_close_matches(wanted, logged, n=1)
    guess = f"did you mean {close[0]}?" if close else f"there are: {', '.join(logged)}"
    raise UsageError(f"train.best_metric {wanted} is never logged; {guess}")


def logged_metrics(
    options: LearnerOptions | AdapterOptions, timesteps: int, validates: bool, pictures: bool
) -> set[str]:
    """The metrics that checkpoints hold. `timesteps`: that the adapter trains on; `pictures`: in the validations."""
    adapter = isinstance(options, AdapterOptions)
    names = _ALWAYS | _MEMORY | (set(bucket_names(timesteps)) if adapter else _RANKS)
    if not validates:
        return names
    measured = {f"loss_timestep/{t:03d}" for t in middles(timesteps)} if adapter else set(_RANKS)
    if adapter and pictures:
        measured |= {"psnr_y", "psnr_y_bicubic"}
    return names | {f"validation/{name}" for name in ("loss", "seconds", *measured)}


def warn_of_idle(options: LearnerOptions | AdapterOptions, dataset: Dataset) -> None:
    """Warns of settings without an effect in so short a training, or on such data. They are not refused, because a
    preset may have set them."""
    train = options.train
    steps = f"and train.max_steps {train.max_steps}"
    if train.validate_every > train.max_steps:
        logger.warning("there will be no validation: train.validate_every is %d %s", train.validate_every, steps)
    elif train.validate_every and dataset.index("validation").num_rows == 0:
        logger.warning("%s; training goes on without validation", no_validation(dataset.uri, dataset.recipe))
    if train.warmup_steps >= train.max_steps:
        message = "the learning rate never leaves its warm-up: train.warmup_steps is %d %s"
        logger.warning(message, train.warmup_steps, steps)
