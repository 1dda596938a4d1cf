"""What an evaluation has measured, kept in its output, so that the same command continues where it stopped.

OUT/_state/evaluation.json                what is evaluated, and the MLflow run of it
OUT/_state/evaluation/DIGEST/KEY.json     figures of one sample, written after its pictures; DIGEST: of what they
                                          follow from
"""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from deedsr.dataset.manifest import STATE
from pipelines.storage import Storage
from pipelines.storage.waiting import patiently

__all__ = ["Measured", "State"]

RESULTS = "results.json"
PICTURES = "pictures"
_RUN = f"{STATE}/evaluation.json"
_SAMPLES = f"{STATE}/evaluation"
_THREADS = 16  # records read at a time


class Measured(NamedTuple):
    """One sample: its part of `results.json`, and by method what metrics of a set take of it."""

    record: dict[str, Any]
    features: dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class State:
    """`samples`: digest of what the figures of a sample follow from; `evaluation`: of the whole, see `run_id`."""

    out: Storage
    samples: str
    evaluation: str

    @property
    def _folder(self) -> str:
        return f"{_SAMPLES}/{self.samples[:16]}"

    def run_id(self) -> str | None:
        """MLflow run of this very evaluation, None where another one was begun here last."""
        begun = self._read(_RUN)
        return begun.get("run_id") if begun.get("evaluation") == self.evaluation else None

    def results(self, run_id: str) -> dict[str, Any] | None:
        """`results.json` of a run, None where there is none yet."""
        found = self._read(RESULTS)
        return found if found.get("run_id") == run_id else None

    def begin(self, run_id: str) -> None:
        """Makes the output this evaluation's: what an earlier one left and this one is about to replace goes first."""
        if self.run_id() == run_id:
            return
        self.out.delete(RESULTS)
        self.out.delete_many(
            [entry.path for entry in self.out.list(_SAMPLES) if not entry.path.startswith(f"{self._folder}/")]
        )
        self._write(_RUN, {"evaluation": self.evaluation, "run_id": run_id})

    def measured(self, keys: Iterable[str]) -> dict[str, Measured]:
        """Those of the samples that an earlier command measured, with their pictures still there."""
        there = {entry.path for entry in self.out.list(self._folder)}
        known = [key for key in keys if self._place(key) in there]
        if not known:
            return {}
        pictures = {entry.path for entry in self.out.list(PICTURES)}
        with ThreadPoolExecutor(_THREADS) as threads:
            found = dict(zip(known, threads.map(self._read, map(self._place, known)), strict=True))
        return {
            key: Measured(stored["record"], _each(_restored, stored["features"]))
            for key, stored in found.items()
            if stored and pictures.issuperset(stored["record"]["pictures"].values())
        }

    def add(self, sample: Measured) -> None:
        stored = {"record": sample.record, "features": _each(_plain, sample.features)}
        self._write(self._place(sample.record["key"]), stored)

    def _place(self, key: str) -> str:
        return f"{self._folder}/{key}.json"

    def _read(self, path: str) -> dict[str, Any]:
        """{} for what is missing or is no JSON object."""
        try:
            found = json.loads(self.out.read(path))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, path: str, value: Mapping[str, Any]) -> None:
        patiently(partial(self.out.write, path, json.dumps(value).encode()))


def _each(change: Callable[[Any], Any], features: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {method: {name: change(value) for name, value in found.items()} for method, found in features.items()}


def _plain(values: np.ndarray) -> dict[str, Any]:
    """JSON keeps every bit of a float, and no shape of nothing."""
    return {"shape": values.shape, "type": str(values.dtype), "values": values.ravel().tolist()}


def _restored(stored: Mapping[str, Any]) -> np.ndarray:
    return np.array(stored["values"], stored["type"]).reshape(stored["shape"])
