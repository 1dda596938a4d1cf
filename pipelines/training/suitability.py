"""Refuses data and configurations that a stage cannot train on, before any worker starts."""

import math
from pathlib import Path

import pyarrow.compute as pc

from deedsr.errors import UsageError
from pipelines.dataset import Dataset
from pipelines.training.config import AdapterOptions, LearnerOptions


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
    from deedsr.sampling.base import picture_unit
    from deedsr.sampling.settings import SamplingSettings
    from deedsr.sampling.weights import tensor_shapes

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
