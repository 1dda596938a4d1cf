"""A training that starts from a finished model's weights, with fresh moments and a schedule of its own."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from deedsr.adapter.adapter import DegradationAwareAdapter
from deedsr.errors import UsageError
from deedsr.hub.model_folder import load_part
from deedsr.learner.resnet import LEARNER_PRESETS, DegradationLearner
from pipelines.models import resolve_base, resolve_learner, resolve_model
from pipelines.training.config import AdapterOptions, LearnerModelOptions, LearnerOptions

# How statistics are taken: the same weights serve any; what the base predicts: older adapters do not say.
NOT_GEOMETRY = {"norm_group", "prediction_type"}


def initial_folder(init: str, part: str) -> Path:
    """Local folder of the `learner` or `adapter` that `--init` names. Raises UsageError where there is none."""
    return resolve_learner(init) if part == "learner" else resolve_model(init) / part


def initial_weights(init: str, part: str, like: Any) -> dict[str, Tensor]:
    """State dict of the `learner` or `adapter` of `init` for a module `like` this one (its weights may be on `meta`).

    Raises UsageError where there is none or it has another geometry.
    """
    folder = initial_folder(init, part)
    stored = load_part(folder.parent, folder.name)
    ours, theirs = _geometry(like), _geometry(stored)
    differing = [f"{key} {theirs.get(key)} instead of {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
    if differing:
        raise UsageError(
            f"--init {init} is of another geometry than this training's {part}: {'; '.join(differing):.300}. "
            "Choose the preset and the base that it was made with, or leave --init out"
        )
    return stored.state_dict()


def check_initial(init: str, options: LearnerOptions | AdapterOptions) -> None:
    """The UsageError of `initial_weights` before any worker starts."""
    part, like = _network(options)
    initial_weights(init, part, like)


def learner_config(model: LearnerModelOptions) -> dict[str, Any]:
    """Arguments of the `DegradationLearner` that stage 1 trains."""
    own = {} if model.statistics is None else {"statistics": tuple(model.statistics)}
    return LEARNER_PRESETS[model.preset] | own | {"norm_group": model.norm_group}


def _network(options: LearnerOptions | AdapterOptions) -> tuple[str, Any]:
    """What the stage would train, without memory."""
    with torch.device("meta"):
        if isinstance(options, LearnerOptions):
            return "learner", DegradationLearner(**learner_config(options.model))
        learner = DegradationLearner.from_config(DegradationLearner.load_config(resolve_learner(options.learner)))
        config = UNet2DConditionModel.load_config(resolve_base(options.base), subfolder="unet")
        unet = UNet2DConditionModel.from_config(config)
        model = options.model
        return "adapter", DegradationAwareAdapter.for_unet(unet, model.preset, learner.dim, model.tokens, model.ablate)


def _geometry(module: Any) -> dict[str, Any]:
    """Configuration as JSON has it, without diffusers' own notes."""
    config = {k: v for k, v in module.config.items() if not k.startswith("_") and k not in NOT_GEOMETRY}
    return json.loads(json.dumps(config))
