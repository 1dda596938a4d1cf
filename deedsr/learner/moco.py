"""Momentum contrast on quadrants of LR images: positive pairs, a momentum key encoder and a queue of past keys.

Shape suffixes: B local batch, D embedding width, K queue length, N samples of a block.
"""

import copy
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from deedsr.learner.resnet import DegradationLearner

EMPTY = -1  # source of an unused queue slot
UNGROUPED = -1  # group of a sample whose degradation no other sample shares
Pixels = TypeVar("Pixels")  # numpy array or torch tensor


def quadrant_pair(lr_CHW: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Two different quadrants of one LR image, query and key, drawn without replacement (docs/method.md, 2.3).

    `lr_CHW` (C, H, W) is a numpy array or a tensor with even sides; the quadrants (C, H/2, W/2) are views of it.
    """
    height, width = lr_CHW.shape[-2:]  # type: ignore[attr-defined]
    if height % 2 or width % 2:
        raise ValueError(f"an image of {height}x{width} pixels has no equal quadrants: both sides must be even")
    query, key = (divmod(int(index), 2) for index in rng.choice(4, size=2, replace=False))
    h, w = height // 2, width // 2
    cut = lambda row, column: lr_CHW[..., row * h : (row + 1) * h, column * w : (column + 1) * w]  # type: ignore[index]
    return cut(*query), cut(*key)


class MomentumContrast(nn.Module):
    """Key encoder, queue and InfoNCE loss. The query encoder, which trains, is not part of it.

    One optimizer step is: `loss` for every micro-batch with `keys` of the same samples; then, once, `advance` with the
    keys of the whole global batch in its order, and `update_momentum`. Each worker holds the same copy.

    Samples interact only within blocks of `batch_block` consecutive samples. A micro-batch holds whole blocks, so the
    result does not depend on the number of workers or on accumulation.

    Args:
        query: the encoder to follow; copied to fp32 here, not kept.
        queue_size: number K of past keys.
        temperature, momentum: of the loss, of the key encoder.
        batch_block: samples per block; a multiple of two or more of the encoder's `norm_group` puts queries and
            their keys into different normalisation groups, so that batch statistics do not reveal the positive.
        batch_negatives: keys of the other samples of the block are negatives too. Neighbours with the same
            content under another degradation make the learner separate degradations instead of contents.
    """

    shuffle: torch.Tensor
    queue_KD: torch.Tensor
    queue_sources_K: torch.Tensor
    queue_groups_K: torch.Tensor
    queue_pointer: torch.Tensor

    def __init__(
        self,
        query: DegradationLearner,
        queue_size: int = 24_576,
        temperature: float = 0.07,
        momentum: float = 0.999,
        batch_block: int = 32,
        batch_negatives: bool = False,
    ):
        super().__init__()
        norm_group = query.config["norm_group"]
        if norm_group and batch_block % norm_group:
            raise ValueError(f"batch_block must be a multiple of norm_group {norm_group}, got {batch_block}")
        self.temperature, self.momentum = temperature, momentum
        self.batch_block, self.batch_negatives = batch_block, batch_negatives
        self.key_encoder = copy.deepcopy(query).float().requires_grad_(False).train()
        # Distributes the samples of a block round-robin over its normalisation groups.
        shuffle = torch.arange(batch_block).view(-1, norm_group or batch_block).T.flatten()
        self.register_buffer("shuffle", shuffle, persistent=False)
        self.register_buffer("queue_KD", torch.zeros(queue_size, query.dim))
        self.register_buffer("queue_sources_K", torch.full((queue_size,), EMPTY))
        self.register_buffer("queue_groups_K", torch.full((queue_size,), UNGROUPED))
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.long))

    def _blocks(self, batch: int) -> int:
        if batch % self.batch_block:
            raise ValueError(f"a micro-batch must hold whole blocks of {self.batch_block} samples, got {batch} samples")
        return batch // self.batch_block

    @torch.no_grad()
    def keys(self, key_BCHW: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D) of the key images in [0, 1], fp32."""
        offsets = self.batch_block * torch.arange(self._blocks(len(key_BCHW)), device=key_BCHW.device)
        order = (offsets[:, None] + self.shuffle).flatten()
        keys_BD = torch.empty(len(key_BCHW), self.queue_KD.shape[1], device=key_BCHW.device)
        keys_BD[order] = self.key_encoder.embed(key_BCHW[order].float())
        return keys_BD

    def loss(
        self, query_BD: torch.Tensor, key_BD: torch.Tensor, sources_B: torch.Tensor, groups_B: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """InfoNCE of one micro-batch, mean over its samples, and the shares of positives ranked first and in the top 5.

        `query_BD` and `key_BD` have length 1. `sources_B` (int64, >= 0) names the photograph of each sample: keys in
        the queue that come from the query's own photograph are no negatives. `groups_B` (int64) names the degradation
        of samples that share it with others, or is UNGROUPED: keys of the query's own group are excluded from
        the negatives, in the queue and in the block.
        """
        batch = len(query_BD)
        query_BD, key_BD = query_BD.float(), key_BD.float()
        positive_B1 = (query_BD * key_BD).sum(1, keepdim=True)
        masked_BK = (self.queue_sources_K == EMPTY) | (self.queue_sources_K == sources_B[:, None])
        masked_BK |= same_group(groups_B[:, None], self.queue_groups_K)
        logits = [positive_B1, (query_BD @ self.queue_KD.T).masked_fill(masked_BK, -torch.inf)]
        if self.batch_negatives:
            blocks = self._blocks(batch)
            negative_BN = torch.bmm(
                query_BD.view(blocks, self.batch_block, -1), key_BD.view(blocks, self.batch_block, -1).transpose(1, 2)
            )
            itself_NN = torch.eye(self.batch_block, dtype=torch.bool, device=query_BD.device)
            groups_BN = groups_B.view(blocks, self.batch_block)
            masked_BNN = itself_NN | same_group(groups_BN[:, :, None], groups_BN[:, None])
            logits.append(negative_BN.masked_fill(masked_BNN, -torch.inf).view(batch, -1))
        scores = torch.cat(logits, 1) / self.temperature
        loss = F.cross_entropy(scores, scores.new_zeros(batch, dtype=torch.long))
        rank_B = (scores[:, 1:] >= scores[:, :1]).sum(1)
        return loss, {"top1": (rank_B < 1).float().mean(), "top5": (rank_B < 5).float().mean()}

    @torch.no_grad()
    def advance(self, key_BD: torch.Tensor, sources_B: torch.Tensor, groups_B: torch.Tensor) -> None:
        """Write the keys of a global batch, in its order, over the oldest ones. The queue may have any length."""
        size = len(self.queue_KD)
        slots = (self.queue_pointer + torch.arange(len(key_BD), device=key_BD.device)) % size
        self.queue_KD[slots[-size:]] = key_BD[-size:].to(self.queue_KD)
        self.queue_sources_K[slots[-size:]] = sources_B[-size:]
        self.queue_groups_K[slots[-size:]] = groups_B[-size:]
        self.queue_pointer.copy_((self.queue_pointer + len(key_BD)) % size)

    @torch.no_grad()
    def update_momentum(self, query_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Move the key encoder towards the query encoder's full fp32 parameters, given by name."""
        query = dict(query_parameters)
        keys = dict(self.key_encoder.named_parameters())
        if query.keys() != keys.keys():
            raise ValueError(f"query and key encoder differ in parameters: {sorted(query.keys() ^ keys.keys())}")
        for name, key in keys.items():
            key.lerp_(query[name].to(key), 1 - self.momentum)


def same_group(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Whether two samples share their degradation; the numbers broadcast."""
    return (one == other) & (one != UNGROUPED)
