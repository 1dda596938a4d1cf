"""A training that starts from a finished model's weights, with fresh moments and a schedule of its own."""

import json
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from deedsr.adapter.adapter import DegradationAwareAdapter
from deedsr.errors import UsageError
from deedsr.hub.model_folder import load_part
from deedsr.learner.resnet import DegradationLearner
from deedsr.presets import LEARNER_PRESETS
from pipelines.models import Adapter, Base, Learner
from pipelines.training.config import AdapterOptions, LearnerModelOptions, LearnerOptions

# How statistics are taken: the same weights serve any; what the base predicts: older adapters do not say.
NOT_GEOMETRY = {"norm_group", "prediction_type"}


def initial_weights(init: Learner | Adapter, like: Any) -> dict[str, Tensor]:
    """State dict of `init` for a module `like` this one (its weights may be on `meta`).

    Raises UsageError where there is none or it has another geometry.
    """
    part = "learner" if isinstance(init, Learner) else "adapter"
    stored = load_part(init.path.parent, init.path.name)
    ours, theirs = _geometry(like), _geometry(stored)
    differing = [f"{key} {theirs.get(key)} instead of {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
    if differing:
        raise UsageError(
            f"--init {init.name} is of another geometry than this training's {part}: {'; '.join(differing):.300}. "
            "Choose the preset and the base that it was made with, or leave --init out"
        )
    return stored.state_dict()


def check_initial_learner(init: Learner, options: LearnerOptions) -> None:
    """The UsageError of `initial_weights` before any worker starts."""
    with torch.device("meta"):
        like = DegradationLearner(**learner_config(options.model))
    initial_weights(init, like)


def check_initial_adapter(init: Adapter, options: AdapterOptions, base: Base, learner: Learner) -> None:
    """The UsageError of `initial_weights` before any worker starts."""
    dim = DegradationLearner.load_config(learner.path)["widths"][-1]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base.path, subfolder="unet"))
        model = options.model
        like = DegradationAwareAdapter.for_unet(unet, model.preset, dim, model.tokens, model.ablate)
    initial_weights(init, like)


def learner_config(model: LearnerModelOptions) -> dict[str, Any]:
    """Arguments of the `DegradationLearner` that stage 1 trains."""
    own = {} if model.statistics is None else {"statistics": tuple(model.statistics)}
    return LEARNER_PRESETS[model.preset] | own | {"norm_group": model.norm_group}


def _geometry(module: Any) -> dict[str, Any]:
    """Configuration as JSON has it, without diffusers' own notes."""
    config = {k: v for k, v in module.config.items() if not k.startswith("_") and k not in NOT_GEOMETRY}
    return json.loads(json.dumps(config))
