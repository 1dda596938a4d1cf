"""Evaluation: a model and bicubic interpolation measured on the same pairs of a dataset.

OUT/results.json                     figures of the set and of every sample, settings, lineage; written last
OUT/pictures/KEY.{lr,bicubic,model,hr}.png
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

import deedsr
from deedsr.dataset.keys import generator
from deedsr.errors import UsageError
from deedsr.metrics import niqe_features, niqe_of_features, psnr_y, ssim_y
from deedsr.metrics.niqe import BLOCK
from pipelines import tracking
from pipelines.dataset import Dataset
from pipelines.models import load_pipeline, resolve_model, training_run
from pipelines.storage import open_storage
from pipelines.strips import strip

METRICS = ("psnr", "ssim", "niqe")  # PSNR and SSIM on Y
METHODS = ("model", "bicubic")
RESULTS = "results.json"
LOGGED_PICTURES = 8  # comparisons among the artifacts of the MLflow run


@dataclass
class EvaluationResult:
    """`metrics`: `{model: {psnr: ...}, bicubic: {...}}`; None where a figure cannot be told."""

    metrics: dict[str, dict[str, float | None]]
    run_id: str
    samples: int
    results: str  # location of results.json
    dataset_digest: str


def evaluate(
    model: str,
    data: str,
    out: str,
    *,
    metrics: Sequence[str] = METRICS,
    split: str = "validation",
    limit: int | None = None,
    steps: int | None = None,
    noise_guidance: float | None = None,
    noise_guidance_share: float | None = None,
    eta: float | None = None,
    color_fix: str | None = None,
    solver: str | None = None,
    tile: int | None = None,
    degradation_per_tile: bool | None = None,
    restoration: float | None = None,
    seed: int = 0,
    experiment: str = "deedsr-evaluation",
    progress: bool = True,
) -> EvaluationResult:
    """Measure a model beside bicubic interpolation; figures and pictures go to `out`, and into an MLflow run.

    Args:
        model: `tiny`, or a model's folder, URI, hub id or `models:/NAME/VERSION`.
        data: a finished dataset of the model's scale.
        out: folder or S3 prefix.
        metrics: of METRICS. PSNR and SSIM are means over the samples, NIQE is one fit over the blocks of all.
        split: `train` or `validation`.
        limit: measure at most so many samples, evenly spread over the split.
        steps, noise_guidance, noise_guidance_share, eta, color_fix, solver, tile, degradation_per_tile,
            restoration: as for `DeeDSRPipeline`; None = the model's own.
        seed: with a sample's key it decides that sample's noise, whatever else is measured.
        experiment: of MLflow.
        progress: show a progress bar on stderr.

    Raises UsageError before any work for unknown metrics, an empty split, or scales that differ.
    """
    from deedsr.sampling.model_folder import ModelFolder

    dataset = Dataset.open(data).require_pixels("evaluation")
    rows = _rows(dataset, split, limit)
    _check_metrics(metrics, dataset, split)
    folder = ModelFolder.read(resolve_model(model))
    if folder.scale != dataset.scale:
        raise UsageError(
            f"{model} enlarges by {folder.scale}, the pairs of {data} differ by {dataset.scale}: "
            "evaluate on a dataset of the model's scale"
        )
    wanted = {
        "num_inference_steps": steps,
        "noise_guidance": noise_guidance,
        "noise_guidance_share": noise_guidance_share,
        "eta": eta,
        "color_fix": color_fix,
        "solver": solver,
        "tile": tile,
        "degradation_per_tile": degradation_per_tile,
        "restoration": restoration,
    }
    sampling = folder.sampling.override(**wanted)
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)

    config = {
        "model": model,
        "data": data,
        "out": out,
        "metrics": list(metrics),
        "split": split,
        "limit": limit,
        "seed": seed,
        "sampling": sampling.as_dict(),
    }
    storage = open_storage(out)
    with tracking.start_run(
        experiment,
        name=Path(str(model).rstrip("/")).name,
        config=config,
        dataset=dataset,
        parents={"adapter": training_run(model)},
        tags={"deedsr.kind": "evaluation", "deedsr.out": tracking.masked_uri(out)},
    ) as run:
        index = dataset.index(split)
        records, features = [], {method: [np.empty((0, 36))] for method in METHODS}
        shown = {rows[i] for i in _evenly(len(rows), LOGGED_PICTURES)}
        for row in tqdm(rows, desc="evaluate", unit="sample", disable=not progress):
            sample = dataset.read(index, row)
            pictures = {
                "model": _sample(pipeline, sample, seed, sampling.as_dict()),
                "bicubic": cv2.resize(sample.lr, sample.hr.shape[1::-1], interpolation=cv2.INTER_CUBIC),
            }
            figures = {}
            for method, picture in pictures.items():
                figures[method] = _measure(picture, sample.hr, dataset.scale, metrics)
                if "niqe" in metrics:
                    features[method].append(niqe_features(picture))
            files = {}
            for name, picture in {"lr": sample.lr, **pictures, "hr": sample.hr}.items():
                files[name] = f"pictures/{sample.key}.{name}.png"
                storage.write(files[name], _png(picture))
            if row in shown:
                run.log_picture(sample.key, strip(sample.lr, pictures["bicubic"], pictures["model"], sample.hr))
            source = sample.info.get("source")
            records.append({"key": sample.key, "source": source, "metrics": figures, "pictures": files})

        summary = {method: _summary(method, metrics, records, features[method]) for method in METHODS}
        results = {
            "format_version": 1,
            "created_by": f"deedsr {deedsr.__version__}",
            "run_id": run.id,
            "model": model,
            "scale": dataset.scale,
            "dataset": {"uri": dataset.uri, "digest": dataset.digest, "split": split},
            "sampling": sampling.as_dict(),
            "seed": seed,
            "metrics": summary,
            "samples": records,
        }
        text = json.dumps(results, indent=1, allow_nan=False)
        run.log_metrics(
            {
                f"{method}.{name}": value
                for method, values in summary.items()
                for name, value in values.items()
                if value is not None
            }
        )
        run.log_text(text, RESULTS)
        storage.write(RESULTS, text.encode())
    return EvaluationResult(summary, run.id, len(records), f"{storage.uri}/{RESULTS}", dataset.digest)


def _rows(dataset: Dataset, split: str, limit: int | None) -> list[int]:
    """Rows of the split's index that are measured."""
    if split not in ("train", "validation"):
        raise UsageError(f"split must be train or validation, got {split!r}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be 1 or more, got {limit}")
    count = dataset.index(split).num_rows
    if not count:
        raise UsageError(
            f"{dataset.uri} has no sample in its {split} split: take another --split, or generate it with a recipe "
            "whose split.validation_patterns or split.validation_share leave some there"
        )
    return _evenly(count, count if limit is None else limit)


def _evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, evenly spread."""
    return [number * count // wanted for number in range(wanted)] if wanted < count else list(range(count))


def _check_metrics(metrics: Sequence[str], dataset: Dataset, split: str) -> None:
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"unknown metric {name!r}: there are {', '.join(METRICS)}")
    if not metrics:
        raise UsageError(f"no metric given: there are {', '.join(METRICS)}")
    side = dataset.recipe.crop.size
    if "niqe" in metrics and side < BLOCK:
        raise UsageError(
            f"niqe needs HR crops of {BLOCK} pixels or more, those of {dataset.uri} have {side}: "
            "leave it out of the metrics"
        )


def _sample(pipeline: Any, sample: Any, seed: int, sampling: dict[str, Any]) -> np.ndarray:
    """The model's uint8 picture of a sample's LR."""
    import torch

    number = int(generator("evaluation", seed, sample.key).integers(2**62))
    picture = pipeline(sample.lr, generator=torch.Generator().manual_seed(number), **sampling).images[0]
    return np.asarray(picture)


def _measure(picture: np.ndarray, hr: np.ndarray, scale: int, metrics: Sequence[str]) -> dict[str, float | None]:
    """The metrics that single pictures have."""
    measures = {"psnr": psnr_y, "ssim": ssim_y}
    return {name: _finite(measures[name](picture, hr, scale)) for name in metrics if name in measures}


def _summary(
    method: str, metrics: Sequence[str], records: list[dict[str, Any]], features: list[np.ndarray]
) -> dict[str, float | None]:
    summary: dict[str, float | None] = {}
    for name in metrics:
        if name == "niqe":
            try:
                summary[name] = niqe_of_features(np.concatenate(features))
            except ValueError:  # the pictures are flat
                summary[name] = None
        else:
            values = [record["metrics"][method][name] for record in records]
            summary[name] = None if None in values else float(np.mean(values))
    return summary


def _finite(value: float) -> float | None:
    """JSON knows no infinity, which is the PSNR of equal pictures."""
    return value if math.isfinite(value) else None


def _png(picture: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
