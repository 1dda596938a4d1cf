"""The whole chain on the shipped photographs, on this machine, with nothing fetched.

Degradation shards, degradation learner, degradation-aware adapter, evaluation beside the shipped `tiny` model,
upscaled pictures, and one report that shows them. The same command again continues where it stopped.
"""

import dataclasses
import json
import os
import shlex
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import PositiveInt

from deedsr.errors import UsageError
from jobs.command import Command, Outcome
from pipelines import tracking
from pipelines.storage import open_storage
from pipelines.tracking.store import sqlite_uri

RECIPE = "demo"
SHOWN_SIDE = 512  # HR pixels per side of the pictures that are upscaled in the end
LABELS = {"demo": "This demo", "tiny": "tiny (shipped)"}


@dataclasses.dataclass
class DemoOptions:
    out: Annotated[str, "output folder"] = "demo"
    learner_steps: Annotated[PositiveInt, "optimizer steps of stage 1"] = 150
    adapter_steps: Annotated[PositiveInt, "optimizer steps of stage 2"] = 200
    workers: Annotated[PositiveInt | None, "processes that make shards; null = one per CPU core"] = None


def run(options: DemoOptions) -> Outcome:
    from jobs.cli import load
    from pipelines.reports.report import Step

    place = open_storage(options.out).local_path("")
    if place is None:
        raise UsageError(f"the demo runs on this machine alone: --out takes a folder, got {options.out}")
    out = place.resolve()
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", sqlite_uri(out / "mlflow.db"))
    os.environ.pop("RAY_ADDRESS", None)  # this machine alone: its files are here
    began = time.perf_counter()
    steps: list[Step] = []
    photos, shards = Path(str(files("deedsr") / "assets" / "photos")), out / "shards"

    def step(name: str, result: Callable[[dict[str, Any]], str], *words: object) -> dict[str, Any]:
        """Runs a command, given its command line; `result` summarises what came out."""
        typed = list(map(str, words))
        length = 2 if typed[0] == "train" else 1
        command, parser = load(" ".join(typed[:length]))
        before = time.perf_counter()
        values = dict(command(parser.read(typed[length:]).options).values)
        line = shlex.join(["deedsr", *(_short(word, out) for word in typed)])
        steps.append(Step(name, line, time.perf_counter() - before, result(values)))
        return values

    made = step(
        "Degradation shards",
        lambda v: f"{v['samples']} pairs in {v['shards']} shards, {v['samples_per_second']:.0f} pairs/s",
        *("shards", "--source", photos, "--out", shards, "--recipe", RECIPE),
        *(("--workers", options.workers) if options.workers else ()),
    )
    trained = lambda v: f"{v['step']} steps, loss {v['loss']:.3f}"
    learner = step(
        "Degradation learner",
        trained,
        *("train", "learner", "--data", shards, "--out", out / "learner"),
        *("--preset", "tiny", "--train.max_steps", options.learner_steps),
    )
    adapter = step(
        "Degradation-aware adapter",
        trained,
        *("train", "adapter", "--data", shards, "--learner", out / "learner", "--base", "tiny"),
        *("--out", out / "adapter", "--preset", "tiny", "--train.max_steps", options.adapter_steps),
    )
    models = {"demo": out / "adapter", "tiny": "tiny"}
    evaluations = {
        name: step(
            f"Evaluation of {LABELS[name]}",
            lambda v: f"PSNR-Y {v['metrics']['model']['psnr']['mean']:.2f} dB",
            *("evaluate", "--model", model, "--data", shards, "--out", out / "evaluation" / name),
            *("--limit", 18, "--metrics", "psnr,ssim,niqe_set"),
        )
        for name, model in models.items()
    }
    degraded = _degraded(photos, out)
    upscaled = {
        name: step(
            f"Upscaling with {LABELS[name]}",
            lambda v: f"{len(v['images'])} pictures",
            *("upscale", degraded, "--out", out / "upscaled" / name, "--model", model),
        )
        for name, model in models.items()
    }
    seconds = time.perf_counter() - began
    report = _report(out, steps, seconds, learner, adapter)
    values = {
        "report": str(report),
        "shards": made["manifest"],
        "learner": learner["checkpoint"],
        "adapter": adapter["checkpoint"],
        "evaluation": {name: found["metrics"] for name, found in evaluations.items()},
        "pictures": str(out / "upscaled"),
        "tracking": os.environ["MLFLOW_TRACKING_URI"],
        "seconds": round(seconds, 1),
    }
    failed = [failure for found in upscaled.values() for failure in found["failed"]]
    return Outcome(values, text=_farewell(values, evaluations), complete=not failed)


def _farewell(values: dict[str, Any], evaluations: dict[str, Any]) -> str:
    from pipelines.reports.tables import text_table

    bicubic = next(iter(evaluations.values()))["metrics"]["bicubic"]
    rows = {"bicubic": bicubic} | {LABELS[name]: found["metrics"]["model"] for name, found in evaluations.items()}
    names = list(bicubic)
    figure = lambda mean: "-" if mean is None else f"{mean:.3f}"
    cells = [[label, *(figure(row[name]["mean"]) for name in names)] for label, row in rows.items()]
    store = tracking.masked_uri(values["tracking"])
    return "\n".join(
        [
            text_table("", ["", *names], cells, 1 + len(names)),
            "",
            f"done in {values['seconds'] / 60:.1f} minutes",
            f"report    {values['report']}   (open it in a browser)",
            f"pictures  {values['pictures']}",
            f"runs      {store}   (mlflow ui --backend-store-uri {shlex.quote(store)}, then http://127.0.0.1:5000)",
        ]
    )


def _degraded(photos: Path, out: Path) -> Path:
    """Crops of the validation photographs, degraded by the recipe; the HR beside them."""
    from PIL import Image

    from deedsr.dataset.keys import generator
    from deedsr.dataset.pictures import decode
    from deedsr.dataset.recipe import load_recipe
    from deedsr.degradation import degrade, draw_degradation

    recipe = load_recipe("deedsr")
    low, high = out / "degraded", out / "hr"
    for folder in (low, high):
        folder.mkdir(exist_ok=True)
    for path in sorted((photos / "validation").glob("*.jpg"))[::2]:
        photo = decode(path.read_bytes())
        top, left = ((side - SHOWN_SIDE) // 2 for side in photo.shape[:2])
        hr = photo[top : top + SHOWN_SIDE, left : left + SHOWN_SIDE]
        rng = generator("demo", path.stem)
        lr = degrade(hr, draw_degradation(recipe.degradation, hr.shape[:2], recipe.scale, rng))
        Image.fromarray(lr).save(low / f"{path.stem}.png")
        Image.fromarray(hr).save(high / f"{path.stem}.png")
    return low


def _report(out: Path, steps: list[Any], seconds: float, learner: dict[str, Any], adapter: dict[str, Any]) -> Path:
    import platform

    from pipelines.data.dataset import Dataset
    from pipelines.machine import this_machine
    from pipelines.reports import report
    from pipelines.tracking.provenance import library_versions

    dataset = Dataset.open(str(out / "shards"))
    results = {LABELS[name]: json.loads((out / "evaluation" / name / "results.json").read_text()) for name in LABELS}
    index = dataset.index("train")
    rows = range(0, index.num_rows, max(1, index.num_rows // 6))
    samples = [dataset.read(index, row) for row in list(rows)[:6]]
    store = tracking.masked_uri(os.environ["MLFLOW_TRACKING_URI"])
    return report.write_report(
        out / "report.html",
        report.DemoReport(
            title="DeeDSR demo",
            summary=(
                f"{dataset.manifest.samples} degraded pairs, a learner of {learner['step']} steps and an adapter "
                f"of {adapter['step']} steps, trained here and measured on photographs they never saw."
            ),
            seconds=seconds,
            dataset_digest=dataset.digest,
            steps=steps,
            evaluation=report.evaluation_of(
                results,
                note="Validation photographs only. This demo's model is as young as its steps say.",
            ),
            trainings=[
                _training_record("Degradation learner", out / "learner", learner["run_id"], ("loss", "top1", "lr")),
                _training_record("Degradation-aware adapter", out / "adapter", adapter["run_id"], ("loss", "lr")),
            ],
            samples=samples,
            pictures=_pictures(out),
            versions=library_versions(),
            machine={"CPU cores": str(this_machine().cpus), "system": platform.platform(terse=True)},
            links=[("Upscaled pictures", "upscaled/"), ("Evaluated pairs", "evaluation/")],
            commands=[
                ("Browse the runs", f"mlflow ui --backend-store-uri {shlex.quote(store)}"),
                ("Compare the runs", "deedsr compare --out comparison.html"),
            ],
        ),
    )


def _training_record(title: str, out: Path, run_id: str, names: tuple[str, ...]) -> Any:
    from pipelines.reports import report
    from pipelines.reports.charts import Curve

    client = tracking.connect(tracking.tracking_uri())
    record = json.loads((out / "training.json").read_text())
    histories = {name: client.get_metric_history(run_id, name) for name in names}
    losses = histories["loss"]
    first, last = losses[0], losses[-1]
    seconds = (last.timestamp - first.timestamp) / 1000 / max(1, last.step - first.step)
    return report.Training(
        title,
        [Curve(name, [(m.step, m.value) for m in history]) for name, history in histories.items()],
        steps=last.step,
        seconds_per_step=seconds,
        config=record["config"],
    )


def _pictures(out: Path) -> list[Any]:
    import cv2

    from deedsr.dataset.pictures import decode
    from pipelines.reports.page import PictureSet
    from pipelines.reports.report import evaluated_pictures

    sets = []
    for low in sorted((out / "degraded").glob("*.png")):
        lr = decode(low.read_bytes())
        bicubic = cv2.resize(lr, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
        versions: dict[str, Any] = {"LR": lr, "Bicubic": bicubic}
        versions |= {label: out / "upscaled" / name / low.name for name, label in LABELS.items()}
        versions["HR"] = out / "hr" / low.name
        sets.append(PictureSet(low.stem.replace("-", " "), versions, shown=LABELS["tiny"]))
    folders = {label: out / "evaluation" / name for name, label in LABELS.items()}
    first = json.loads((next(iter(folders.values())) / "results.json").read_text())
    keys = [sample["key"] for sample in first["samples"]]
    return sets + evaluated_pictures(folders, keys[:: max(1, len(keys) // 4)][:4], shown=LABELS["tiny"])


def _short(word: str, out: Path) -> str:
    """A word as it would be typed in the folder above `out`."""
    return os.path.relpath(word, out.parent) if os.path.isabs(word) else word


COMMAND = Command(DemoOptions, run, example="deedsr demo --out demo")
