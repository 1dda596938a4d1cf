"""Interface of a metric: its definition, its value for a picture, and its value for a set of pictures."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Metric", "Setting"]


@dataclass(frozen=True)
class Setting:
    """Options of all metrics. `border`: pixels left out on each side, by metrics that allow it; `weights`:
    folder with weights files, searched before the caches of other libraries; `device`: of torch."""

    border: int = 0
    weights: Path | None = None
    device: str = "cpu"


class Metric(ABC):
    """One metric. A subclass gives the attributes and `measure`; constructing one is cheap, `prepare` loads weights.

    Pictures are uint8 RGB arrays (H, W, 3).
    """

    name: str  # in --metrics and in results
    title: str  # in tables
    definition: str  # variant, colour space, border, averaging; figures of different definitions are not comparable
    source: str  # publication or code
    higher_is_better: bool
    unit: str = ""
    digits: int = 2  # decimals in tables
    needs_reference: bool = True
    of_pictures: bool = True  # False: only a set has a value

    def __init__(self, setting: Setting = Setting()):
        self.setting = setting

    @abstractmethod
    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> Any:
        """Value for one picture, None where it has none. For a metric of sets: the features that `summary` takes.

        Raises ValueError for pictures for which the metric is not defined.
        """

    def summary(self, measured: Sequence[Any]) -> float | None:
        """Value for a set from the results of `measure`; None where it has none."""
        return None if None in measured else float(np.mean(measured))

    def prepare(self) -> None:  # noqa: B027
        """Load what `measure` needs. Raises UsageError where a file is missing or another than expected."""

    def statement(self) -> str:
        """Definition, direction and source in one line. Only values with equal statements are comparable."""
        return f"{self.definition}; {'higher' if self.higher_is_better else 'lower'} is better; {self.source}"
