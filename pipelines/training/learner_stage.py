"""Stage 1: the degradation learner, by momentum contrast between quadrants of one LR image."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deedsr.dataset.keys import generator
from deedsr.learner.moco import UNGROUPED, MomentumContrast, quadrant_pair, same_group
from deedsr.learner.normalization import commit_statistics, drop_statistics, pending_statistics
from deedsr.learner.resnet import DegradationLearner
from pipelines.data.dataset import Dataset
from pipelines.models import Learner
from pipelines.training.config import LearnerOptions
from pipelines.training.engine import Engine
from pipelines.training.stage import (
    Stage,
    Weights,
    compile_blocks,
    initial_weights,
    learner_config,
    save_model,
    under,
    unit,
)


class LearnerBatch(TypedDict):
    """Quadrant pairs of a micro-batch."""

    query: Tensor  # (B, 3, H, W) uint8
    key: Tensor  # (B, 3, H, W), another quadrant of the same LR image
    source: Tensor  # (B,) photograph
    group: Tensor  # (B,) degradation group, or UNGROUPED


class LearnerStage(Stage):
    together = True

    def __init__(self, options: LearnerOptions):
        self.options = options
        self.init = Learner(options.init) if options.init else None
        self.models = [self.init] if self.init else []

    def network(self) -> DegradationLearner:
        return DegradationLearner(**learner_config(self.options.model))

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(self.options.train.seed)
        self.learner = self.network().to(device)
        if self.init:
            self.learner.load_state_dict(initial_weights(self.init, self.learner))
        if self.options.train.gradient_checkpointing:
            self.learner.checkpoint_gradients()
        if self.options.train.compile:
            compile_blocks(self.learner.blocks())
        self.contrast = MomentumContrast(self.learner, **asdict(self.options.contrast)).to(device)
        self.step_keys: list[tuple[Tensor, Tensor, Tensor]] = []  # keys, photographs, degradation groups
        return self.learner.train()

    def sample(self, dataset: Dataset, index: pa.Table, row: int, epoch: int) -> dict[str, Any]:
        """Two quadrants of one LR image, drawn anew each epoch."""
        name, lr = dataset.read_lr(index, row)
        rng = generator("quadrants", self.options.train.seed, epoch, name)
        query, key = quadrant_pair(lr.transpose(2, 0, 1), rng)
        group = index["degradation_group"][row].as_py()
        return {
            "query": query,
            "key": key,
            "source": np.int64(int(index["source_sha256"][row].as_py()[:15], 16)),
            "group": np.int64(UNGROUPED if group is None else group),
        }

    def loss(self, model: Callable[..., Tensor], batch: LearnerBatch) -> tuple[Tensor, dict[str, Tensor]]:
        query_BD = model(unit(batch["query"]), embedding=True)
        key_BD = self.contrast.keys(unit(batch["key"]))
        self.step_keys.append((key_BD, batch["source"], batch["group"]))
        return self.contrast.loss(query_BD, key_BD, batch["source"], batch["group"])

    def validation_step(self, model: Callable[..., Tensor], batch: LearnerBatch) -> Tensor:
        """Embeddings of both quadrants by the network that trains, which is the one exported, and the degradation group
        as the bits of a float: (B, 2 D + 1)."""
        embeddings = [model(unit(batch[part]), embedding=True).float() for part in ("query", "key")]
        return torch.cat([*embeddings, batch["group"].int().view(torch.float32)[:, None]], 1)

    def validation_metrics(self, rows_SN: Tensor) -> dict[str, Tensor]:
        """InfoNCE of each query among the keys of all pairs but the others of its degradation group, and how often its
        own ranks first or in the top 5."""
        query_SD, key_SD = rows_SN[:, :-1].chunk(2, 1)
        group_S = rows_SN[:, -1].contiguous().view(torch.int32)
        own = torch.arange(len(rows_SN), device=rows_SN.device)
        masked_SS = same_group(group_S[:, None], group_S) & (own[:, None] != own)
        scores_SS = (query_SD @ key_SD.T / self.options.contrast.temperature).masked_fill(masked_SS, -torch.inf)
        rank_S = (scores_SS >= scores_SS.diagonal()[:, None]).sum(1) - 1
        return {
            "loss": F.cross_entropy(scores_SS, own),
            "top1": (rank_S < 1).float().mean(),
            "top5": (rank_S < 5).float().mean(),
        }

    def end_step(self, engine: Engine) -> None:
        commit_statistics(self.learner, engine.sum(pending_statistics(self.learner)))
        keys, sources, groups = (engine.gather(torch.cat(parts)) for parts in zip(*self.step_keys, strict=True))
        self.step_keys.clear()
        self.contrast.advance(keys, sources, groups)
        self.contrast.update_momentum(engine.full_parameters())

    def drop_step(self) -> None:
        drop_statistics(self.learner)
        self.step_keys.clear()

    def state(self) -> Weights:
        parameters = {name for name, _ in self.learner.named_parameters()}
        buffers = {f"buffers.{k}": tensor for k, tensor in self.learner.state_dict().items() if k not in parameters}
        return buffers | {f"contrast.{name}": t for name, t in self.contrast.state_dict().items()}

    def load_state(self, state: Weights) -> None:
        contrast = under(state, "contrast.")
        # A checkpoint from before there were groups: its keys count as ungrouped.
        contrast.setdefault("queue_groups_K", torch.full_like(contrast["queue_sources_K"], UNGROUPED))
        self.contrast.load_state_dict(contrast)
        self.learner.load_state_dict(under(state, "buffers."), strict=False)

    def export(self, folder: Path, trained: Weights, state: Weights, history: dict[str, Any] | None = None) -> None:
        save_model(self.learner, trained | under(state, "buffers."), folder / "learner")
