"""Restoration gate: share of the sampled picture in the result, predicted from the degradation vector.

A generative model also changes pictures that are nearly clean. The gate blends its output with the bicubic enlargement
of the LR image; for a nearly clean picture the share is low. The gate of a model is calibrated on photographs.
Shape suffixes: B batch, V vectors per picture, D degradation vector, C channels, H W pixels.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from deedsr.errors import UsageError
from deedsr.sampling.color_fix import Rows
from deedsr.sampling.images import strips


@dataclass(frozen=True)
class RestorationGate:
    """`sigmoid(weights . vector + offset)`: the share, 0 to 1, of the sampled picture in the result."""

    weights: tuple[float, ...]  # one per entry of the degradation vector
    offset: float

    @classmethod
    def of(cls, values: Mapping[str, Any], width: int | None = None) -> Self:
        """A gate from a model's configuration. Raises UsageError for an invalid one or another length than `width`."""
        weights, offset = values.get("weights"), values.get("offset")
        numbers: list[Any] = [*weights, offset] if isinstance(weights, list | tuple) else [None]
        if not all(isinstance(number, int | float) for number in numbers) or set(values) != {"weights", "offset"}:
            raise UsageError("gate must have weights, a list of numbers, and offset, a number")
        if width is not None and len(numbers) != width + 1:
            raise UsageError(f"the gate is for degradation vectors of {len(numbers) - 1}, the learner gives {width}")
        return cls(tuple(float(number) for number in numbers[:-1]), float(numbers[-1]))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def shares(self, vectors_BVD: torch.Tensor) -> torch.Tensor:
        """Share of each picture (B,), the mean over its vectors."""
        weights_D = torch.tensor(self.weights, dtype=torch.float32, device=vectors_BVD.device)
        return torch.sigmoid(vectors_BVD.float() @ weights_D + self.offset).mean(1)


def blend(picture_BCHW: torch.Tensor, enlarged: Rows, shares_B: torch.Tensor) -> None:
    """In place: `shares_B` of the picture, the rest of the enlarged LR image; strip by strip."""
    shares_B111 = shares_B.view(-1, 1, 1, 1)
    for rows in strips(*picture_BCHW.shape[2:]):
        part = picture_BCHW[:, :, rows]
        part.copy_(torch.lerp(enlarged(rows), part, shares_B111))
