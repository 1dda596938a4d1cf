"""Evaluation: a model and bicubic interpolation measured on the same pairs of a dataset, here or on a cluster.

OUT/results.json                     figures of the set and of every sample, settings, lineage; written last
OUT/pictures/KEY.{lr,bicubic,model,hr}.png
OUT/_state/                          what is measured so far, see `evaluator`
OUT/claim.json                       one command at a time, see `pipelines.claims`
"""

import hashlib
import json
import logging
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
from deedsr.metrics.fidelity import WINDOW
from deedsr.metrics.metric import Metric
from deedsr.metrics.niqe import BLOCK
from deedsr.metrics.registry import WITHOUT_WEIGHTS
from pipelines import cluster, tracking
from pipelines.claims import Claim, held
from pipelines.data.dataset import Dataset, no_validation
from pipelines.data.index import require_hr
from pipelines.distribution import each, network_plan
from pipelines.inference.evaluator import METHODS, PICTURES, RESULTS, Evaluated, Evaluator, Measured, State
from pipelines.models import Model
from pipelines.placement import Device, place_networks
from pipelines.reports.page import picture_name, strip
from pipelines.storage import Storage, open_storage
from pipelines.storage.waiting import patiently
from pipelines.tracking.registry import log_evaluation

logger = logging.getLogger(__name__)
LOGGED_PICTURES = 8  # comparisons among the artifacts of the MLflow run


@dataclass
class EvaluationResult:
    """`metrics`: `{model: {psnr: ...}, bicubic: {...}}`; None for an undefined value."""

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
    metrics: Sequence[str] = WITHOUT_WEIGHTS,
    metric_weights: str | None = None,
    border: int = 0,
    split: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    device: Device = "auto",
    experiment: str = "deedsr-evaluation",
    progress: bool = True,
    steps: int | None = None,
    **sampling: object,
) -> EvaluationResult:
    """Measure a model beside bicubic interpolation; figures and pictures go to `out`, and into an MLflow run.

    Computed in this process, or in actors of the cluster that `RAY_ADDRESS` names. Each sample is kept in `out` as it
    is measured: the same call continues with what is missing and the MLflow run that it began, and does nothing when
    all is done. One with another model, dataset or setting begins anew in `out`.

    Args:
        model: `tiny`, or a model's folder, URI, hub id or `models:/NAME/VERSION`.
        data: a finished dataset of the model's scale.
        out: folder or S3 prefix.
        base: where the model's base lies: folder, URI or hub id; None = where the model says.
        metrics: names that `deedsr.metrics.registry` knows.
        metric_weights: folder or S3 prefix with weights files of LPIPS, DISTS and FID; None = only the cache of
            torch's hub is searched.
        border: pixels that PSNR and SSIM leave out on each side.
        split: `train` or `validation`.
        limit: measure at most so many samples, evenly spread over the split.
        seed: with a sample's key it decides that sample's noise, whatever else is measured.
        device: `auto` = a CUDA GPU where this machine has one, and on a cluster always; `cpu`; `cuda`; `mps`.
        experiment: of MLflow.
        progress: show a progress bar on stderr.
        steps: sampling steps.
        sampling: other settings of `SamplingSettings`; what is None or missing is the model's own.

    Raises UsageError before any work for unknown metrics, an empty split, scales that differ, or an `out` that another
    command writes.
    """
    dataset = Dataset.open(data).require_pixels("evaluation")
    require_hr(dataset)
    rows = _rows(dataset, split, limit)
    if border < 0 or dataset.recipe.crop.size - 2 * border < WINDOW:
        raise UsageError(f"border must leave {WINDOW} pixels of HR crops of {dataset.recipe.crop.size}, got {border}")
    found = Model.find(model, base)
    if found.description.scale != dataset.scale:
        raise UsageError(
            f"{model} enlarges by {found.description.scale}, the pairs of {data} differ by {dataset.scale}: "
            "evaluate on a dataset of the model's scale"
        )
    settings = found.description.sampling.chosen(num_inference_steps=steps, **sampling)
    table = dataset.index(split)
    pairs = {pair["key"][0].as_py(): pair for pair in (table.take([row]) for row in rows)}
    storage = open_storage(out)
    storage.require_writable()
    # Workers need nothing of the index, which the dataset keeps and its copy does not.
    work = Evaluator(
        found,
        replace(dataset),
        tuple(metrics),
        settings,
        seed,
        device,
        border=border,
        metric_weights=metric_weights,
    )
    measures = _prepared(work)
    definitions = {name: metric.statement() for name, metric in measures.items()}
    both = {"model": model, "sampling": settings.as_dict(), "seed": seed, "definitions": definitions}
    chosen = {"steps" if key == "num_inference_steps" else key: value for key, value in settings.as_dict().items()}
    # As `deedsr evaluate --config` takes it.
    config = {
        "model": found.name,
        "base": base,
        "data": data,
        "out": out,
        "metrics": ",".join(metrics),
        "metric_weights": metric_weights,
        "border": border,
        "split": split,
        "limit": limit,
        "seed": seed,
        "device": device,
        "experiment": experiment,
        **chosen,
        "definitions": definitions,
    }
    about = {
        "format_version": 1,
        "created_by": f"deedsr {deedsr.__version__}",
        "model": model,
        "scale": dataset.scale,
        "dataset": {"uri": dataset.uri, "digest": dataset.digest, "split": split},
        **both,
    }
    return _Evaluation(work, measures, pairs, storage, experiment, config, about, progress).run()


@dataclass(frozen=True)
class _Evaluation:
    """An evaluation whose options are checked. `about`: its description in `results.json`."""

    work: Evaluator
    measures: dict[str, Metric]
    pairs: dict[str, pa.Table]  # by key, in the order of the results
    out: Storage
    experiment: str
    config: dict[str, Any]
    about: dict[str, Any]
    progress: bool

    def run(self) -> EvaluationResult:
        state = self._state()
        with held(Claim(self.out)) as claim:
            samples = state.measured(self.pairs)
            run_id = state.run_id()
            if run_id and len(samples) == len(self.pairs) and (results := state.results(run_id)):
                return self._result(results)
            if samples:
                logger.info("evaluate: %d of %d samples are measured already", len(samples), len(self.pairs))
            missing = [pair for key, pair in self.pairs.items() if key not in samples]
            compute = _computing(self.work, len(missing)) if missing else iter
            with self._started(run_id, claim) as run:
                state.begin(run.id)
                with tqdm(
                    compute(missing), "evaluate", len(self.pairs), initial=len(samples), unit="sample",
                    disable=not self.progress,
                ) as computed:  # fmt: skip
                    for sample, pictures in computed:
                        claim.check()
                        for name, path in sample.record["pictures"].items():
                            patiently(self.out.write, path, _png(pictures[name]))
                        state.add(sample)  # its pictures are whole
                        samples[sample.record["key"]] = sample
                self._log_pictures(run, samples)
                results = self._results(run, samples)
                if training := self.work.model.run_id:
                    log_evaluation(run, training, self.work.model.path, results)
            claim.check()
            patiently(self.out.write, RESULTS, _text(results).encode())
        return self._result(results)

    def _state(self) -> State:
        samples = self.work.made_of() | {"definitions": self.about["definitions"]}
        whole = {"samples": samples, "keys": [*self.pairs], "experiment": self.experiment}
        whole["store"] = tracking.masked_uri(tracking.tracking_uri())
        return State(self.out, _digest(samples), _digest(whole))

    def _started(self, run_id: str | None, claim: Claim) -> tracking.Run:
        return tracking.start_run(
            self.experiment,
            name=Path(str(self.config["model"]).rstrip("/")).name,
            config=self.config,
            dataset=self.work.dataset,
            parents={"adapter": self.work.model.run_id},
            run_id=run_id,
            tags={"deedsr.kind": "evaluation"},
            permit=claim.holds,
            out=self.out.uri,
        )

    def _log_pictures(self, run: tracking.Run, measured: dict[str, Measured]) -> None:
        keys = [*self.pairs]
        for key in (keys[i] for i in _evenly(len(keys), LOGGED_PICTURES)):
            lr, bicubic, picture, hr = (
                _pixels(self.out.read(f"{PICTURES}/{key}.{name}.png")) for name in ("lr", "bicubic", "model", "hr")
            )
            source = measured[key].record["source"]
            title = source["path"] if source else key
            run.log_picture(
                picture_name(title, key), strip(title, lr, {"bicubic": bicubic, "model": picture, "HR": hr}), step=0
            )

    def _results(self, run: tracking.Run, measured: dict[str, Measured]) -> dict[str, Any]:
        """Content of `results.json`, also logged to MLflow."""
        samples = [measured[key] for key in self.pairs]
        summary = {
            method: {
                name: metric.summary(_values(name, metric, method, samples)) for name, metric in self.measures.items()
            }
            for method in METHODS
        }
        results = self.about | {"run_id": run.id, "metrics": summary, "samples": [sample.record for sample in samples]}
        run.log_metrics(
            {
                f"{method}.{name}": value
                for method, values in summary.items()
                for name, value in values.items()
                if value is not None
            }
        )
        run.log_text(_text(results), RESULTS)
        return results

    def _result(self, results: dict[str, Any]) -> EvaluationResult:
        place = f"{self.out.uri}/{RESULTS}"
        return EvaluationResult(results["metrics"], results["run_id"], len(self.pairs), place, self.work.dataset.digest)


def _computing(work: Evaluator, pairs: int) -> Callable[[list[pa.Table]], Iterator[Evaluated]]:
    """`work` in this process, or in actors of the cluster that `RAY_ADDRESS` names, once one can start there."""
    if cluster.is_named():
        plan = network_plan("evaluate", work.device, parts=pairs)
        return partial(each, replace(work, device=plan.device), plan=plan, command="evaluate")
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


def _prepared(work: Evaluator) -> dict[str, Metric]:
    """The metrics with their weights, loaded before any work; on the CPU, since this process may have no GPU."""
    measures = replace(work, device="cpu").measures
    side = work.dataset.recipe.crop.size
    if "niqe_set" in measures and side < BLOCK:
        raise UsageError(
            f"niqe_set needs HR crops of {BLOCK} pixels or more, those of {work.dataset.uri} have {side}: "
            "leave it out of the metrics"
        )
    for metric in measures.values():
        metric.prepare()
    return measures


def _values(name: str, metric: Metric, method: str, samples: Sequence[Measured]) -> list[Any]:
    """Values of a metric for the pictures of a method."""
    if metric.of_pictures:
        return [sample.record["metrics"][method][name] for sample in samples]
    return [sample.features[method][name] for sample in samples]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _text(results: dict[str, Any]) -> str:
    return json.dumps(results, indent=1, allow_nan=False)


def _pixels(png: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _png(picture: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
