"""Evaluations at work, and what they left."""

import json
from pathlib import Path

import psutil

from pipelines.inference import evaluation
from pipelines.inference.options import EvaluateOptions


def actors() -> list[psutil.Process]:
    """Processes of the tests' cluster that evaluate."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "_Actor" in process.name() + "".join(process.cmdline())]


def evaluate(model, data, out, progress=True, metrics=None, **options) -> evaluation.EvaluationResult:
    names = None if metrics is None else ",".join(metrics)
    given = EvaluateOptions(model=model, data=data, out=str(out), metrics=names, **options)
    return evaluation.evaluate(given, progress)


def assert_same(one: Path, other: Path) -> None:
    one_results, other_results = (json.loads((out / "results.json").read_text()) for out in (one, other))
    assert one_results["samples"] == other_results["samples"]
    assert one_results["metrics"] == other_results["metrics"]
    for sample in one_results["samples"]:
        for name in sample["pictures"].values():
            assert (one / name).read_bytes() == (other / name).read_bytes()
