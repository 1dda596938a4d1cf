"""What a stage provides, and the weights that a training starts from."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from deedsr.errors import UsageError
from deedsr.hub.model_folder import load_part
from deedsr.presets import LEARNER_PRESETS
from pipelines.data.dataset import Dataset
from pipelines.models import Adapter, Learner, Reference
from pipelines.training.checkpoint import Checkpoint, Tensors
from pipelines.training.config import LearnerModelOptions
from pipelines.training.engine import Engine

if TYPE_CHECKING:
    from deedsr.sampling.pipeline import DeeDSRPipeline

Weights = dict[str, Tensor]  # by name
# How statistics are taken: the same weights serve any; what the base predicts: older adapters do not say.
NOT_GEOMETRY = {"norm_group", "prediction_type"}


class Stage(ABC):
    """One of the two trainings. The loop calls, in this order: `build` once, for every micro-batch `loss`, and once
    per optimizer step `end_step`, or `drop_step` where the step was not taken."""

    options: Any  # LearnerOptions or AdapterOptions
    together = False  # the variants of one content stay adjacent in the order of samples
    models: list[Reference]  # that `build` reads
    init: Learner | Adapter | None

    def fetch(self) -> None:
        """Bring what `build` reads to this node, which may take longer than a step."""
        for model in self.models:
            _ = model.path

    def check_init(self) -> None:
        """The UsageError of `initial_weights` before any worker starts."""
        if self.init:
            with torch.device("meta"):
                like = self.network()
            initial_weights(self.init, like)

    @abstractmethod
    def network(self) -> nn.Module:
        """What trains, with the default initial weights."""

    @abstractmethod
    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Make the networks from the options' seed; return the module whose parameters with gradients train."""

    @abstractmethod
    def sample(self, dataset: Dataset, index: pa.Table, row: int, epoch: int) -> dict[str, Any]:
        """One training sample; its randomness comes from the seed, the sample's key and the epoch. Runs on threads."""

    @abstractmethod
    def loss(self, model: Callable[..., Tensor], batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a micro-batch and numbers to log; `model` is the engine around what `build` returned."""

    @abstractmethod
    def validation_step(self, model: Callable[..., Tensor], batch: Any) -> Tensor:
        """Values of each sample for `validation_metrics`, (B, N) in fp32; changes nothing."""

    @abstractmethod
    def validation_metrics(self, rows_SN: Tensor) -> dict[str, Tensor]:
        """Validation metrics from the rows that `validation_step` gave for all samples."""

    @abstractmethod
    def export(self, folder: Path, trained: Weights, state: Weights, history: dict[str, Any] | None = None) -> None:
        """Write the model that whole fp32 parameters and what `state` gave make; `history` goes into the model card."""

    def pipeline(self) -> "DeeDSRPipeline | None":
        """A pipeline around the networks as they are, where the stage makes pictures."""
        return None

    def end_step(self, engine: Engine) -> None:  # noqa: B027, most stages have nothing to do here
        """What advances once per optimizer step besides the trained parameters; every worker calls it."""

    def drop_step(self) -> None:  # noqa: B027
        """Forget what `loss` collected for a step that was not taken."""

    def state(self) -> Weights:
        """Tensors besides trained parameters and optimizer state that a continuation needs."""
        return {}

    def load_state(self, state: Weights) -> None: ...  # noqa: B027


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def write_model(stage: Stage, folder: Path, dataset: Dataset, last: Checkpoint, tensors: Tensors) -> None:
    """The model that a checkpoint holds: of the averaged weights where there are any, else of the last ones."""
    averaged, rest = under(tensors["state"], "ema."), under(tensors["state"], "stage.")
    samples = dataset.index("train").num_rows
    history = {
        "dataset": {"digest": dataset.digest, "recipe": dataset.recipe.name, "samples": samples},
        "step": last.step,
        "samples_seen": last.samples_seen,
        "metrics": {name: value for name, value in last.metrics.items() if name.startswith("validation/")},
    }
    stage.export(folder, averaged or tensors["trained"], rest, history)


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block by itself: blocks of one shape share their kernels, and no graph is as large as a network."""
    # Torch compiles a method for so many shapes at most; a UNet has more kinds of blocks than its default.
    torch._dynamo.config.recompile_limit = 64
    for block in blocks:
        block.compile(dynamic=False)


def unit(pixels: Tensor) -> Tensor:
    """8-bit pixels in [0, 1], fp32. They are moved to the device as bytes."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def save_model(like: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Save `weights` as a model of the class and configuration of `like`, but for the place that it was loaded from."""
    with torch.device("meta"):  # initial values would be drawn for seconds
        model = type(like)(**{key: value for key, value in like.config.items() if not key.startswith("_")})
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(folder)


def initial_weights(init: Learner | Adapter, like: Any) -> Weights:
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


def learner_config(model: LearnerModelOptions) -> dict[str, Any]:
    """Arguments of the `DegradationLearner` that stage 1 trains."""
    own = {} if model.statistics is None else {"statistics": tuple(model.statistics)}
    return LEARNER_PRESETS[model.preset] | own | {"norm_group": model.norm_group}


def _geometry(module: Any) -> dict[str, Any]:
    """Configuration as JSON has it, without diffusers' own notes."""
    config = {k: v for k, v in module.config.items() if not k.startswith("_") and k not in NOT_GEOMETRY}
    return json.loads(json.dumps(config))
