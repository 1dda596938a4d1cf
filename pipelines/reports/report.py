"""The report of a demo: one HTML file that shows what was run and what came out.

It takes plain data and opens nothing but the picture files that it is given:

    write_report("out/report.html", DemoReport(
        title="...", summary="...", seconds=512.0,
        steps=[Step("Degradation shards", "deedsr shards --source ...", 31.0, "96 pairs in 4 shards")],
        evaluation=Evaluation(digest, samples=24, metrics={"Bicubic": {"psnr": 23.1, ...}, "tiny": {...}}),
        trainings=[Training("Degradation learner", curves=[Curve("loss", [(1, 4.1), ...])], ...)],
        samples=[dataset.read(index, 0), ...],
        pictures=[PictureSet("Yellow-Flower", {"LR": ..., "Bicubic": ..., "This demo": ..., "tiny": ..., "HR": ...})],
        versions={"torch": "..."}, machine={"CPU": "2 cores"}, dataset_digest=digest,
        links=[("Lossless pictures", "evaluation/pictures/")],
        commands=[("Browse the runs", "mlflow ui --backend-store-uri sqlite:////...")],
    ))
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deedsr.errors import DeeDSRError
from pipelines.data.dataset import Sample
from pipelines.reports.charts import Curve, draw
from pipelines.reports.page import PictureSet, pair_view, picture_view, write_page, yaml_text
from pipelines.reports.tables import methods_table


@dataclass(frozen=True)
class Step:
    """One command of the chain: `command` as a person would type it, `result` one line of what came out."""

    name: str
    command: str
    seconds: float
    result: str


@dataclass(frozen=True)
class Training:
    """One trained stage. Each curve becomes a chart of its own; `config` is the whole resolved configuration."""

    name: str
    curves: Sequence[Curve]
    steps: int
    seconds_per_step: float
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Metrics of several methods on the same pairs of one dataset: `metrics[method][name]`, names of the registry.

    The first method is the one that the others are compared with (bicubic). None: an undefined value.
    """

    dataset_digest: str
    samples: int
    metrics: Mapping[str, Mapping[str, float | None]]
    note: str = ""


def evaluation_of(results: Mapping[str, Mapping[str, Any]], note: str = "") -> Evaluation:
    """The table of several `results.json` by label (`{"This demo": {...}, "tiny": {...}}`), bicubic first.

    Raises DeeDSRError when they were not taken on the same pairs, or by metrics of other definitions: such figures may
    not share a table.
    """
    pairs = {
        label: (found["dataset"]["digest"], tuple(sample["key"] for sample in found["samples"]))
        for label, found in results.items()
    }
    if len(set(pairs.values())) != 1:
        told = ", ".join(f"{label}: {len(keys)} pairs of {digest[:12]}" for label, (digest, keys) in pairs.items())
        raise DeeDSRError(f"evaluations of different pairs cannot share a table ({told}): evaluate on one dataset")
    ((digest, keys),) = set(pairs.values())
    stated: dict[str, set[str | None]] = {}
    for found in results.values():
        for name in found["metrics"]["model"]:
            stated.setdefault(name, set()).add(found.get("definitions", {}).get(name))
    for name, definitions in stated.items():
        if len(definitions) > 1:
            told = " / ".join(sorted(definition or "not recorded" for definition in definitions))
            raise DeeDSRError(
                f"figures of different definitions of {name} cannot share a table ({told}): evaluate again"
            )
    figures = {"Bicubic": next(iter(results.values()))["metrics"]["bicubic"]}
    figures |= {label: found["metrics"]["model"] for label, found in results.items()}
    metrics = {label: {name: one["mean"] for name, one in found.items()} for label, found in figures.items()}
    return Evaluation(digest, len(keys), metrics, note)


def evaluated_pictures(folders: Mapping[str, Path], keys: Sequence[str], shown: str = "") -> list[PictureSet]:
    """Pictures that evaluations left, by label of the model; the folders hold `results.json` and `pictures/`.

    All were taken on the same pairs: LR, bicubic and HR come from the first folder.
    """
    found = {label: json.loads((folder / "results.json").read_text()) for label, folder in folders.items()}
    samples = {label: {sample["key"]: sample for sample in result["samples"]} for label, result in found.items()}
    first = next(iter(folders))
    sets = []
    for key in keys:
        base = samples[first][key]
        files = {"LR": folders[first] / base["pictures"]["lr"], "Bicubic": folders[first] / base["pictures"]["bicubic"]}
        files |= {label: folder / samples[label][key]["pictures"]["model"] for label, folder in folders.items()}
        files["HR"] = folders[first] / base["pictures"]["hr"]
        psnr = {"Bicubic": base["metrics"]["bicubic"].get("psnr")}
        psnr |= {label: samples[label][key]["metrics"]["model"].get("psnr") for label in folders}
        figures = {label: f"{value:.2f} dB" for label, value in psnr.items() if value is not None}
        sets.append(PictureSet(_scene_name(base), files, note=f"Sample {key}", shown=shown, figures=figures))
    return sets


def _scene_name(sample: Mapping[str, Any]) -> str:
    """Readable name of a sample: that of its photograph, else its key."""
    path = (sample["source"] or {}).get("path")
    return Path(path).stem.replace("-", " ").replace("_", " ") if path else sample["key"]


@dataclass(frozen=True)
class DemoReport:
    """All that the page shows. Sections without content are left out."""

    title: str
    summary: str
    seconds: float
    dataset_digest: str
    steps: Sequence[Step]
    evaluation: Evaluation
    trainings: Sequence[Training]
    samples: Sequence[Sample]
    pictures: Sequence[PictureSet]
    versions: Mapping[str, str]
    machine: Mapping[str, str] = field(default_factory=dict)
    links: Sequence[tuple[str, str]] = ()  # label, and a path relative to the report or an address
    commands: Sequence[tuple[str, str]] = ()


def write_report(out: str | Path, report: DemoReport) -> Path:
    """Write the page to `out`. About 100 kB for each 512 px version of a picture: a dozen scenes stay under 8 MB."""
    write_page(
        out,
        "report.html",
        report=report,
        total=sum(step.seconds for step in report.steps) or 1.0,
        table=methods_table(report.evaluation.metrics),
        pictures=[picture_view(picture) for picture in report.pictures],
        samples=[pair_view(sample) for sample in report.samples],
        charts=[[draw([curve], curve.name) for curve in training.curves] for training in report.trainings],
        configs=[yaml_text(training.config) for training in report.trainings],
    )
    return Path(out)
