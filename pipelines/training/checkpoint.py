"""Checkpoints that belong to no world size: full fp32 tensors as safetensors, committed last.

`OUT/checkpoints/step-00000100/` holds `trained.safetensors` (what trains), `optimizer.safetensors` (its moments),
`state.safetensors` (queue, momentum encoder, averages) and `checkpoint.json`, written last: step, samples seen, loss
and the SHA-256 of each file. A folder without `checkpoint.json` does not count.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field

from safetensors.torch import load, save
from torch import Tensor

from deedsr.errors import DeeDSRError
from pipelines.storage import Storage

logger = logging.getLogger(__name__)
PARTS = ("trained", "optimizer", "state")


@dataclass
class Checkpoint:
    step: int
    samples_seen: int
    loss: float
    sha256: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # as logged last
    unsent: list[list] = field(default_factory=list)  # points of the curves that the MLflow store has not taken yet

    @property
    def folder(self) -> str:
        return f"checkpoints/step-{self.step:08d}"


def write(out: Storage, checkpoint: Checkpoint, tensors: dict[str, dict[str, Tensor]], keep: int) -> None:
    """Write and commit; then drop all but the newest `keep`."""
    for part in PARTS:
        data = save({name: t.detach().contiguous().cpu() for name, t in tensors[part].items()})
        checkpoint.sha256[part] = hashlib.sha256(data).hexdigest()
        out.write(f"{checkpoint.folder}/{part}.safetensors", data)
    out.write(f"{checkpoint.folder}/checkpoint.json", json.dumps(asdict(checkpoint)).encode())
    for old in committed(out)[:-keep]:
        # The commit record goes first: a half-deleted checkpoint no longer counts.
        for name in ("checkpoint.json", *(f"{part}.safetensors" for part in PARTS)):
            out.delete(f"{old.folder}/{name}")


def committed(out: Storage) -> list[Checkpoint]:
    """Every committed checkpoint, oldest first."""
    records = [e.path for e in out.list("checkpoints/") if e.path.endswith("/checkpoint.json")]
    return sorted((Checkpoint(**json.loads(out.read(path))) for path in records), key=lambda c: c.step)


def read_latest(out: Storage) -> tuple[Checkpoint, dict[str, dict[str, Tensor]]] | None:
    """The newest checkpoint whose files are whole; a damaged one is skipped with a warning."""
    found = committed(out)
    for checkpoint in reversed(found):
        try:
            return checkpoint, {part: _read(out, checkpoint, part) for part in PARTS}
        except (FileNotFoundError, ValueError) as error:
            logger.warning("checkpoint %s/%s is damaged (%s): trying the one before", out.uri, checkpoint.folder, error)
    if found:
        raise DeeDSRError(f"every checkpoint in {out.uri}/checkpoints is damaged: delete that folder to start again")
    return None


def _read(out: Storage, checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    data = out.read(f"{checkpoint.folder}/{part}.safetensors")
    if hashlib.sha256(data).hexdigest() != checkpoint.sha256[part]:
        raise ValueError(f"{part}.safetensors does not match its SHA-256")
    return load(data)
