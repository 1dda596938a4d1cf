"""The checkpoint that a worker group continues from."""

from typing import Any

import torch
import torch.distributed as dist

from deedsr.errors import DeeDSRError
from pipelines.storage import Storage
from pipelines.training import checkpoint


def read_agreed(out: Storage, device: torch.device) -> tuple[checkpoint.Checkpoint, checkpoint.Tensors] | None:
    """Rank 0's newest whole checkpoint, on every worker; None where rank 0 finds none. A collective.

    Raises the DeeDSRError of rank 0 on every worker, and one where a worker cannot read what rank 0 has chosen.
    """
    rank = dist.get_rank()
    mine, error = None, None
    try:
        mine = checkpoint.read_latest(out)
    except DeeDSRError as reason:
        error = reason
    said: list[Any] = [error or (mine and mine[0])]
    dist.broadcast_object_list(said, src=0, device=device)
    chosen = said[0]
    if isinstance(chosen, DeeDSRError):
        raise chosen
    if chosen is None or (mine and mine[0].sha256 == chosen.sha256 and mine[0].step == chosen.step):
        return mine if chosen else None
    mine = None  # another one than rank 0's: its memory is needed
    try:
        return chosen, checkpoint.read(out, chosen)
    except (FileNotFoundError, ValueError) as reason:
        raise DeeDSRError(
            f"worker {rank} cannot read {out.uri}/{chosen.folder}, from which worker 0 continues ({reason}): "
            f"{out.uri} must be the same storage on every node"
        ) from reason
