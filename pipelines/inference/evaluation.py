"""Evaluation: a model, bicubic interpolation and given pictures measured side by side, here or on a cluster.

OUT/results.json                     figures of the set and of every picture, settings, lineage; written last
OUT/rows.parquet                     a row for each picture, method and metric
OUT/table.{txt,md,tex}               means, intervals, differences, win rates
OUT/evaluation.html                  the tables, and the best, median and worst pictures
OUT/pictures/KEY.{lr,bicubic,model,hr}.png    what was made here, and what a dataset holds
OUT/_state/                          what is measured so far, see `evaluator`
OUT/claim.json                       one command at a time, see `pipelines.claims`
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

import deedsr
from deedsr.dataset.members import encode
from deedsr.errors import UsageError
from deedsr.metrics.fidelity import WINDOW
from deedsr.metrics.intervals import Difference, differences, means, of_sets
from deedsr.metrics.metric import Metric
from deedsr.metrics.niqe import BLOCK
from deedsr.metrics.registry import WITHOUT_WEIGHTS, known, named_in_errors
from pipelines import cluster, tracking
from pipelines.claims import Claim, held
from pipelines.data.dataset import Dataset
from pipelines.data.index import require_hr
from pipelines.distribution import each, network_plan
from pipelines.inference.evaluator import RESULTS, Evaluated, Evaluator, Measured, State, place_in, read_pixels
from pipelines.inference.options import EvaluateOptions
from pipelines.inference.parts import Given, Part, dataset_given, evenly, files_given, samples_given
from pipelines.models import Model
from pipelines.placement import place_networks
from pipelines.reports.evaluation import write_evaluation
from pipelines.reports.page import picture_name, strip
from pipelines.reports.tables import Figures, Table, differences_table, latex, markdown, means_table, plain
from pipelines.storage import Storage, open_storage, scratch_folder
from pipelines.storage.waiting import patiently
from pipelines.tracking.registry import log_evaluation

logger = logging.getLogger(__name__)
ROWS, TABLE, PAGE = "rows.parquet", "table.txt", "evaluation.html"
LOGGED_PICTURES = 8  # comparisons among the artifacts of the MLflow run


Means = dict[str, dict[str, float | None]]


@dataclass
class EvaluationResult:
    """`metrics`: `{method: {metric: {mean, low, high}}}`, `differences`: see `deedsr.metrics.intervals.Difference`."""

    metrics: dict[str, Means]
    differences: list[dict[str, Any]]
    rejected: dict[str, str]  # pictures without figures, and why
    run_id: str
    samples: int
    results: str  # location of results.json
    dataset_digest: str


def evaluate(options: EvaluateOptions, progress: bool = True) -> EvaluationResult:
    """Measure a model, bicubic interpolation and given pictures side by side; figures go to `out` and an MLflow run.

    Computed in this process, or in actors of the cluster that `RAY_ADDRESS` names. Each picture is kept in `out` as it
    is measured: the same call continues with what is missing and the MLflow run that it began, and does nothing when
    all is done. One with another model, dataset or setting begins anew in `out`. The seed and a picture's key decide
    that picture's noise, whatever else is measured. `progress`: show a bar on stderr.

    Raises UsageError before any work for unknown metrics, no pictures, names that do not fit, scales that differ, or an
    `out` that another command writes. Files that cannot be measured are in `rejected`, for all methods.
    """
    if options.model and not options.data:
        raise UsageError(f"--model {options.model} needs --data: shards, or a folder of LR pictures")
    if not options.data and not options.pictures:
        raise UsageError("nothing to evaluate: give --model and --data, or --pictures FOLDER")
    found = Model.find(options.model, options.base) if options.model else None
    dataset = dataset_given(options.data) if options.data else None
    if dataset is not None:
        given = _samples(dataset, found, options)
    elif options.data and not (found or options.reference):
        raise UsageError(f"--data {options.data} holds LR pictures: give --model to enlarge them, or --reference")
    else:
        scale = found.description.scale if found else None
        given = files_given(options.data, options.reference, options.pictures, scale, options.limit)
    if found is None and options.device == "auto":
        options = replace(options, device="cpu")  # nothing but metrics
    settings = found.description.sampling.chosen(**options.sampling()) if found else None
    storage = open_storage(options.out)
    storage.require_writable()
    names = options.metric_names()
    if names is None:  # those that need no download, and no reference where there is none
        names = [name for name in WITHOUT_WEIGHTS if given.has_hr or not known()[name].needs_reference]
    work = Evaluator(
        options,
        options.device,
        methods=(*(("model",) if found else ()), *given.named, *(("bicubic",) if given.has_lr else ())),
        metrics=tuple(names),
        model=found,
        sampling=settings,
        dataset=dataset and replace(dataset),  # without the index, which the dataset keeps and its copy does not
    )
    measures = _prepared(work, given)
    about: dict[str, Any] = {
        "format_version": 2,
        "created_by": f"deedsr {deedsr.__version__}",
        "model": options.model,
        "scale": found and found.description.scale,
        "dataset": {"uri": given.uri, "digest": given.digest, "split": options.split if dataset else None},
        "reference": options.reference,
        "pictures": list(options.pictures),
        "sampling": settings and settings.as_dict(),
        "precision": options.precision if found else None,
        "seed": options.seed,
        "definitions": {name: metric.statement() for name, metric in measures.items()},
    }
    config = {  # as `deedsr evaluate --config` takes it
        **{name: value for name, value in asdict(options).items() if name not in ("steps", *options.sampling())},
        **{"model": found and found.name, "metrics": ",".join(names), "definitions": about["definitions"]},
    }
    if settings:
        chosen = settings.as_dict()
        config |= {"steps": chosen.pop("num_inference_steps"), **chosen}
    return _Evaluation(work, measures, given, storage, config, about, progress).run()


def _samples(dataset: Dataset, model: Model | None, options: EvaluateOptions) -> Given:
    """Parts of a dataset, which is fit for this model."""
    border, size = options.border, dataset.recipe.crop.size
    dataset.require_pixels("evaluation")
    require_hr(dataset)
    if options.reference:
        raise UsageError(
            f"{dataset.uri} is a dataset, which holds its HR pictures: leave out --reference {options.reference}"
        )
    if model is None and not options.pictures:
        raise UsageError(f"{dataset.uri} is a dataset, and nothing enlarges it: give --model, or --pictures")
    given = samples_given(dataset, options.split, options.pictures, options.limit)
    if border < 0 or size - 2 * border < WINDOW:
        raise UsageError(f"border must leave {WINDOW} pixels of HR crops of {size}, got {border}")
    if model is not None and model.description.scale != dataset.scale:
        raise UsageError(
            f"{model.name} enlarges by {model.description.scale}, the pairs of {dataset.uri} differ by "
            f"{dataset.scale}: evaluate on a dataset of the model's scale"
        )
    return given


@dataclass(frozen=True)
class _Evaluation:
    """An evaluation whose options are checked. `about`: its description in `results.json`."""

    work: Evaluator
    measures: dict[str, Metric]
    given: Given
    out: Storage
    config: dict[str, Any]
    about: dict[str, Any]
    progress: bool

    def run(self) -> EvaluationResult:
        state, parts = self._state(), self.given.parts
        with held(Claim(self.out)) as claim:
            samples = state.measured(parts)
            run_id = state.run_id()
            if run_id and len(samples) == len(parts) and (results := state.results(run_id)):
                return self._result(results)
            if samples:
                logger.info("evaluate: %d of %d samples are measured already", len(samples), len(parts))
            missing = [part for part in parts if part.key not in samples]
            computed = _computed(self.work, missing) if missing else iter(())
            with self._started(run_id, claim) as run:
                state.begin(run.id)
                with tqdm(
                    computed, "evaluate", len(parts), initial=len(samples), unit="picture",
                    disable=not self.progress,
                ) as bar:  # fmt: skip
                    for sample, pictures in bar:
                        claim.check()
                        for name, picture in pictures.items():
                            patiently(self.out.write, sample.record["pictures"][name], encode(picture, "png"))
                        state.add(sample)  # its pictures are whole
                        samples[sample.record["key"]] = sample
                results = self._results(run, [samples[part.key] for part in parts])
                model = self.work.model
                if model and (training := model.run_id):
                    log_evaluation(run, training, model.path, results)
            claim.check()
            patiently(self.out.write, RESULTS, _text(results).encode())
        return self._result(results)

    def _state(self) -> State:
        samples = self.work.made_of() | {"definitions": self.about["definitions"]}
        whole = {
            "samples": samples,
            "parts": [(part.key, *part.versions) for part in self.given.parts],
            "experiment": self.config["experiment"],
            "format_version": self.about["format_version"],
            "rejected": self.given.rejected,
            "store": tracking.masked_uri(tracking.tracking_uri()),
        }
        return State(self.out, _digest(samples), _digest(whole))

    def _started(self, run_id: str | None, claim: Claim) -> tracking.Run:
        return tracking.start_run(
            self.config["experiment"],
            name=self.label("model") if self.work.model else ", ".join(self.work.methods),
            config=self.config,
            dataset=tracking.DatasetInput(self.given.digest, self.given.uri),
            parents={"adapter": self.work.model.run_id if self.work.model else None},
            run_id=run_id,
            tags={"deedsr.kind": "evaluation"},
            permit=claim.holds,
            out=self.out.uri,
        )

    def label(self, method: str) -> str:
        """What a method is called in tables."""
        return Path(str(self.config["model"]).rstrip("/")).name if method == "model" else method

    def _results(self, run: tracking.Run, measured: list[Measured]) -> dict[str, Any]:
        """Content of `results.json`, logged to MLflow with rows, tables, the page and some pictures."""
        rejected = {one.record["key"]: one.rejected for one in measured if one.rejected} | self.given.rejected
        samples = [one for one in measured if not one.rejected]
        reason = ": ".join(next(iter(rejected.items()), ()))
        if not samples:
            raise UsageError(f"no picture of {self.given.uri} could be measured, such as {reason}")
        if rejected:
            logger.warning("evaluate: %d pictures are left out for all methods, such as %s", len(rejected), reason)
        figures, changes = _figures(samples, self.work.methods, self.measures)
        records = [sample.record for sample in samples]
        results = self.about | {
            "run_id": run.id,
            "metrics": {
                method: {name: one._asdict() for name, one in found.items()} for method, found in figures.items()
            },
            "differences": [change._asdict() for change in changes],
            "rejected": rejected,
            "samples": records,
        }
        every = {f"{method}.{name}": one.mean for method, found in figures.items() for name, one in found.items()}
        run.log_metrics({name: mean for name, mean in every.items() if mean is not None})
        for record in (records[number] for number in evenly(len(records), LOGGED_PICTURES)):
            pictures = self._versions(record)
            title = record["source"]["path"] if record["source"] else record["key"]
            shown = {"HR" if name == "hr" else name: pixels for name, pixels in pictures.items() if name != "lr"}
            run.log_picture(picture_name(title, record["key"]), strip(title, pictures.get("lr"), shown), step=0)
        labels = {method: self.label(method) for method in self.work.methods}
        tables = [means_table(figures, self.measures, labels), differences_table(changes, self.measures, labels)]
        about = {"Pictures": str(len(samples)), "From": self.given.uri, "Digest": self.given.digest}
        with scratch_folder() as folder:
            for name, content in ({ROWS: _rows_file(samples)} | _table_files(tables)).items():
                (folder / name).write_bytes(content)
            write_evaluation(folder / PAGE, labels, about, tables, self.measures, records, rejected, self._versions)
            for path in folder.iterdir():
                patiently(self.out.write, path.name, path.read_bytes())
                run.log_artifact(path)
        run.log_text(_text(results), RESULTS)
        return results

    def _versions(self, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Pixels of a record's pictures by name: LR, the methods, the first one last, HR."""
        pictures = record["pictures"]
        names = [name for name in ("lr", *reversed(self.work.methods), "hr") if name in pictures]
        return {name: read_pixels(place_in(self.out, pictures[name])) for name in names}

    def _result(self, results: dict[str, Any]) -> EvaluationResult:
        place = f"{self.out.uri}/{RESULTS}"
        return EvaluationResult(
            results["metrics"], results["differences"], results["rejected"], results["run_id"],
            len(results["samples"]), place, self.given.digest,
        )  # fmt: skip


def _computed(work: Evaluator, parts: list[Part]) -> Iterator[Evaluated]:
    """In this process, or in actors of the cluster that `RAY_ADDRESS` names, once one can start there."""
    if cluster.is_named():
        plan = network_plan("evaluate", work.device, parts=len(parts))
        return each(replace(work, device=plan.device), parts, plan, "evaluate")
    place_networks(cluster.this_machine(), work.device, 1, "evaluate")
    if work.model is not None:
        _ = work.sampler.pipeline  # one that cannot be loaded leaves no run behind
    return map(work, parts)


def _prepared(work: Evaluator, given: Given) -> dict[str, Metric]:
    """The metrics with their weights, loaded before any work; on the CPU, since this process may have no GPU."""
    measures = replace(work, device="cpu").measures
    if work.dataset and "niqe_set" in measures and (side := work.dataset.recipe.crop.size) < BLOCK:
        raise UsageError(
            f"niqe_set needs HR crops of {BLOCK} pixels or more, those of {work.dataset.uri} have {side}: "
            "leave it out of the metrics"
        )
    for name, metric in measures.items():
        if metric.needs_reference and not given.has_hr:
            raise UsageError(f"{name} needs references: give --reference FOLDER, or leave it out of --metrics")
        with named_in_errors(name):
            metric.prepare()
    return measures


def _figures(
    samples: Sequence[Measured], methods: Sequence[str], measures: Mapping[str, Metric]
) -> tuple[Figures, list[Difference]]:
    """Figures of each method, and differences of each two."""
    figures: Figures = {method: {} for method in methods}
    changes: list[Difference] = []
    for name, metric in measures.items():
        if metric.of_pictures:
            values = {method: [one.record["metrics"][method][name] for one in samples] for method in methods}
            found, change = means(values), differences(name, values, metric.higher_is_better)
        else:
            with named_in_errors(name):
                features = {method: [one.features[method][name] for one in samples] for method in methods}
                found, change = of_sets(name, features, metric.summary)
        changes += change
        for method in methods:
            figures[method][name] = found[method]
    return figures, changes


def _table_files(tables: Sequence[Table]) -> dict[str, bytes]:
    """Files with the tables for a terminal, in Markdown and in LaTeX, by name."""
    forms = {TABLE: plain, "table.md": markdown, "table.tex": latex}
    return {
        name: ("\n\n".join(form(table) for table in tables if table.rows) + "\n").encode()
        for name, form in forms.items()
    }


def _rows_file(samples: Sequence[Measured]) -> bytes:
    """A Parquet file with a row for each picture, method and metric."""
    rows = [
        {"picture": sample.record["key"], "method": method, "metric": name, "value": value}
        for sample in samples
        for method, found in sample.record["metrics"].items()
        for name, value in found.items()
    ]
    schema = pa.schema({"picture": pa.string(), "method": pa.string(), "metric": pa.string(), "value": pa.float64()})
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), file)
    return file.getvalue()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _text(results: dict[str, Any]) -> str:
    return json.dumps(results, indent=1, allow_nan=False)
