"""Evaluation: a model and bicubic interpolation measured on the same pairs of a dataset.

OUT/results.json                     figures of the set and of every sample, settings, lineage; written last
OUT/pictures/KEY.{lr,bicubic,model,hr}.png
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from tqdm import tqdm

import deedsr
from deedsr.errors import UsageError
from deedsr.metrics import niqe_of_features
from deedsr.metrics.niqe import BLOCK
from pipelines import cluster, tracking
from pipelines.dataset import Dataset
from pipelines.evaluation.work import METHODS, METRICS, Evaluated, Evaluator
from pipelines.index import require_hr
from pipelines.models import model_digest, pinned, resolve_model, training_run
from pipelines.placement import Device, place_networks
from pipelines.splits import no_validation
from pipelines.spread import place, spread
from pipelines.storage import open_storage
from pipelines.storage.waiting import patiently
from pipelines.strips import strip

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
    base: str | None = None,
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
    device: Device = "auto",
    experiment: str = "deedsr-evaluation",
    progress: bool = True,
) -> EvaluationResult:
    """Measure a model beside bicubic interpolation; figures and pictures go to `out`, and into an MLflow run.

    Computed in this process, or in actors of the cluster that `RAY_ADDRESS` names.

    Args:
        model: `tiny`, or a model's folder, URI, hub id or `models:/NAME/VERSION`.
        data: a finished dataset of the model's scale.
        out: folder or S3 prefix.
        base: where the model's base lies: folder, URI or hub id; None = where the model says.
        metrics: of METRICS. PSNR and SSIM are means over the samples, NIQE is one fit over the blocks of all.
        split: `train` or `validation`.
        limit: measure at most so many samples, evenly spread over the split.
        steps, noise_guidance, noise_guidance_share, eta, color_fix, solver, tile, degradation_per_tile,
            restoration: as for `DeeDSRPipeline`; None = the model's own.
        seed: with a sample's key it decides that sample's noise, whatever else is measured.
        device: `auto` = a CUDA GPU where this machine has one, and on a cluster always; `cpu`; `cuda`; `mps`.
        experiment: of MLflow.
        progress: show a progress bar on stderr.

    Raises UsageError before any work for unknown metrics, an empty split, or scales that differ.
    """
    from deedsr.sampling.model_folder import ModelFolder

    dataset = Dataset.open(data).require_pixels("evaluation")
    require_hr(dataset)
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
    sampling = folder.sampling.chosen(**wanted)
    table = dataset.index(split)
    pairs = [table.take([row]) for row in rows]
    keys = [pair["key"][0].as_py() for pair in pairs]
    storage = open_storage(out)
    storage.require_writable()
    # Workers need nothing of the index, which the dataset keeps and its copy does not.
    work = Evaluator(pinned(model), replace(dataset), tuple(metrics), sampling, seed, device, base=base)
    compute = _computing(work, len(pairs))

    config = {
        "model": model,
        "base": base,
        "data": data,
        "out": out,
        "metrics": list(metrics),
        "split": split,
        "limit": limit,
        "seed": seed,
        "sampling": sampling.as_dict(),
    }
    with tracking.start_run(
        experiment,
        name=Path(str(model).rstrip("/")).name,
        config=config,
        dataset=dataset,
        parents={"adapter": training_run(model)},
        tags={"deedsr.kind": "evaluation", "deedsr.out": tracking.masked_uri(out)},
    ) as run:
        shown = {keys[i] for i in _evenly(len(keys), LOGGED_PICTURES)}
        records, features = {}, {}
        for done in tqdm(compute(pairs), total=len(pairs), desc="evaluate", unit="sample", disable=not progress):
            files = {name: f"pictures/{done.key}.{name}.png" for name in done.pictures}
            for name, picture in done.pictures.items():
                patiently(partial(storage.write, files[name], _png(picture)))
            if done.key in shown:
                run.log_picture(done.key, strip(*(done.pictures[name] for name in ("lr", "bicubic", "model", "hr"))))
            record = {"key": done.key, "source": done.source, "metrics": done.metrics, "pictures": files}
            records[done.key] = record
            features[done.key] = done.features

        samples = [records[key] for key in keys]
        summary = {
            method: _summary(method, metrics, samples, [features[key][method] for key in keys if "niqe" in metrics])
            for method in METHODS
        }
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
            "samples": samples,
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
        patiently(partial(storage.write, RESULTS, text.encode()))
    return EvaluationResult(summary, run.id, len(samples), f"{storage.uri}/{RESULTS}", dataset.digest)


def _computing(work: Evaluator, pairs: int) -> Callable[[list[pa.Table]], Iterator[Evaluated]]:
    """`work` in this process, or in actors of the cluster that `RAY_ADDRESS` names, once one can start there."""
    if cluster.is_named():
        work = replace(work, digest=model_digest(work.model, base=work.base))
        plan = place("evaluate", pairs, work.device)
        return partial(spread, replace(work, device=plan.device), plan=plan, command="evaluate")
    place_networks(cluster.this_machine(), work.device, 1, "evaluate")
    _ = work.pipeline  # one that cannot be loaded leaves no run behind
    return partial(map, work)


def _rows(dataset: Dataset, split: str, limit: int | None) -> list[int]:
    """Rows of the split's index that are measured."""
    if split not in ("train", "validation"):
        raise UsageError(f"split must be train or validation, got {split!r}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be 1 or more, got {limit}")
    count = dataset.index(split).num_rows
    if not count:
        raise UsageError(
            f"{no_validation(dataset.uri, dataset.recipe)}; or evaluate on --split train"
            if split == "validation"
            else f"{dataset.uri} has no sample in its train split: take --split validation"
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


def _png(picture: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
