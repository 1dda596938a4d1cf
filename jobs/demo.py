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

RECIPE = "demo"
SHOWN_SIDE = 512  # HR pixels per side of the pictures that are upscaled in the end
LABELS = {"demo": "This demo", "tiny": "tiny (shipped)"}


@dataclasses.dataclass
class DemoOptions:
    out: Annotated[str, "output folder"] = "demo"
    learner_steps: Annotated[PositiveInt, "optimizer steps of stage 1"] = 150
    adapter_steps: Annotated[PositiveInt, "optimizer steps of stage 2"] = 200
    workers: Annotated[PositiveInt | None, "processes that make shards; null = one per CPU core"] = None


@dataclasses.dataclass
class Timed:
    """One step of the chain: its command line, duration and result."""

    name: str
    command: str
    seconds: float
    result: str


def run(options: DemoOptions) -> Outcome:
    from pipelines.storage import open_storage
    from pipelines.tracking.store import sqlite_uri

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
    chain = Chain(out, options)
    shards = chain.shards()
    learner = chain.learner()
    adapter = chain.adapter()
    evaluations = {name: chain.evaluation(name) for name in LABELS}
    upscaled = {name: chain.upscaling(name) for name in LABELS}
    seconds = time.perf_counter() - began
    report = chain.report(seconds, learner, adapter)
    values = {
        "report": str(report),
        "shards": shards["manifest"],
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
    from pipelines.tracking import masked_uri

    bicubic = next(iter(evaluations.values()))["metrics"]["bicubic"]
    rows = {"bicubic": bicubic} | {LABELS[name]: found["metrics"]["model"] for name, found in evaluations.items()}
    names = list(bicubic)
    width = max(map(len, rows))
    table = [" " * width + "".join(f"{name:>10}" for name in names)]
    for label, row in rows.items():
        figures = ("-" if row[name] is None else f"{row[name]:.3f}" for name in names)
        table.append(f"{label:<{width}}" + "".join(f"{figure:>10}" for figure in figures))
    store = masked_uri(values["tracking"])
    return "\n".join(
        [
            *table,
            "",
            f"done in {values['seconds'] / 60:.1f} minutes",
            f"report    {values['report']}   (open it in a browser)",
            f"pictures  {values['pictures']}",
            f"runs      {store}   (mlflow ui --backend-store-uri {shlex.quote(store)}, then http://127.0.0.1:5000)",
        ]
    )


class Chain:
    """Runs the commands one after the other, with options parsed as on the command line."""

    def __init__(self, out: Path, options: DemoOptions):
        self.out, self.options = out, options
        self.photos = Path(str(files("deedsr") / "assets" / "photos"))
        self.steps: list[Timed] = []

    def _timed(self, name: str, command: str, work: Callable[[], dict[str, Any]], said: Callable[[Any], str]) -> Any:
        began = time.perf_counter()
        values = work()
        self.steps.append(Timed(name, command, time.perf_counter() - began, said(values)))
        return values

    def _run(self, name: str, words: list[str], said: Callable[[Any], str]) -> dict[str, Any]:
        """Runs one command, given its command line."""
        from jobs.cli import load

        length = 2 if words[0] == "train" else 1
        command, parser = load(" ".join(words[:length]))
        options = parser.read(words[length:]).options
        typed = shlex.join(["deedsr", *(_short(word, self.out) for word in words)])
        return self._timed(name, typed, lambda: dict(command(options).values), said)

    def shards(self) -> dict[str, Any]:
        words = ["shards", "--source", str(self.photos), "--out", str(self.out / "shards"), "--recipe", RECIPE]
        if self.options.workers:
            words += ["--workers", str(self.options.workers)]
        return self._run(
            "Degradation shards",
            words,
            lambda v: f"{v['samples']} pairs in {v['shards']} shards, {v['samples_per_second']:.0f} pairs/s",
        )

    def _training(self, max_steps: int) -> list[str]:
        return ["--preset", "tiny", "--train.max_steps", str(max_steps)]

    def learner(self) -> dict[str, Any]:
        words = ["train", "learner", "--data", str(self.out / "shards"), "--out", str(self.out / "learner")]
        return self._run(
            "Degradation learner",
            words + self._training(self.options.learner_steps),
            lambda v: f"{v['step']} steps, loss {v['loss']:.3f}",
        )

    def adapter(self) -> dict[str, Any]:
        words = ["train", "adapter", "--data", str(self.out / "shards"), "--learner", str(self.out / "learner")]
        words += ["--base", "tiny", "--out", str(self.out / "adapter")]
        return self._run(
            "Degradation-aware adapter",
            words + self._training(self.options.adapter_steps),
            lambda v: f"{v['step']} steps, loss {v['loss']:.3f}",
        )

    def _model(self, name: str) -> str:
        return "tiny" if name == "tiny" else str(self.out / "adapter")

    def evaluation(self, name: str) -> dict[str, Any]:
        words = ["evaluate", "--model", self._model(name), "--data", str(self.out / "shards")]
        words += ["--out", str(self.out / "evaluation" / name), "--limit", "18", "--metrics", "psnr,ssim,niqe_set"]
        return self._run(
            f"Evaluation of {LABELS[name]}", words, lambda v: f"PSNR-Y {v['metrics']['model']['psnr']:.2f} dB"
        )

    def upscaling(self, name: str) -> dict[str, Any]:
        degraded = self._degraded()
        words = ["upscale", str(degraded), "--out", str(self.out / "upscaled" / name), "--model", self._model(name)]
        return self._run(f"Upscaling with {LABELS[name]}", words, lambda v: f"{len(v['images'])} pictures")

    def _degraded(self) -> Path:
        """Crops of the validation photographs, degraded as the recipe says; the HR beside them."""
        from PIL import Image

        from deedsr.dataset.keys import generator
        from deedsr.dataset.recipe import load_recipe
        from deedsr.degradation import degrade, draw_degradation

        recipe = load_recipe("deedsr")
        low, high = self.out / "degraded", self.out / "hr"
        for folder in (low, high):
            folder.mkdir(exist_ok=True)
        for path in sorted((self.photos / "validation").glob("*.jpg"))[::2]:
            photo = _rgb(path)
            top, left = ((side - SHOWN_SIDE) // 2 for side in photo.shape[:2])
            hr = photo[top : top + SHOWN_SIDE, left : left + SHOWN_SIDE]
            rng = generator("demo", path.stem)
            lr = degrade(hr, draw_degradation(recipe.degradation, hr.shape[:2], recipe.scale, rng))
            Image.fromarray(lr).save(low / f"{path.stem}.png")
            Image.fromarray(hr).save(high / f"{path.stem}.png")
        return low

    def report(self, seconds: float, learner: dict[str, Any], adapter: dict[str, Any]) -> Path:
        import platform

        from pipelines import tracking
        from pipelines.data.dataset import Dataset
        from pipelines.machine import this_machine
        from pipelines.reports import report
        from pipelines.tracking.provenance import library_versions

        dataset = Dataset.open(str(self.out / "shards"))
        results = {
            LABELS[name]: json.loads((self.out / "evaluation" / name / "results.json").read_text()) for name in LABELS
        }
        index = dataset.index("train")
        rows = range(0, index.num_rows, max(1, index.num_rows // 6))
        samples = [dataset.read(index, row) for row in list(rows)[:6]]
        store = tracking.masked_uri(os.environ["MLFLOW_TRACKING_URI"])
        return report.write_report(
            self.out / "report.html",
            report.DemoReport(
                title="DeeDSR demo",
                summary=(
                    f"{dataset.manifest.samples} degraded pairs, a learner of {learner['step']} steps and an adapter "
                    f"of {adapter['step']} steps, trained here and measured on photographs they never saw."
                ),
                seconds=seconds,
                dataset_digest=dataset.digest,
                steps=[report.Step(*dataclasses.astuple(step)) for step in self.steps],
                evaluation=report.evaluation_of(
                    results,
                    note="Validation photographs only. This demo's model is as young as its steps say.",
                ),
                trainings=[
                    self._training_record("Degradation learner", "learner", learner["run_id"], ("loss", "top1", "lr")),
                    self._training_record("Degradation-aware adapter", "adapter", adapter["run_id"], ("loss", "lr")),
                ],
                samples=[report.ShardSample(s.key, s.lr, s.hr, s.info["degradation"]) for s in samples],
                pictures=self._pictures(),
                versions=library_versions(),
                machine={"CPU cores": str(this_machine().cpus), "system": platform.platform(terse=True)},
                links=[
                    report.Link("Upscaled pictures", "upscaled/"),
                    report.Link("Evaluated pairs", "evaluation/"),
                ],
                commands=[
                    ("Browse the runs", f"mlflow ui --backend-store-uri {shlex.quote(store)}"),
                    ("Compare the runs", "deedsr compare --out comparison.html"),
                ],
            ),
        )

    def _training_record(self, title: str, stage: str, run_id: str, names: tuple[str, ...]) -> Any:
        from pipelines import tracking
        from pipelines.reports import report
        from pipelines.reports.charts import Curve

        client = tracking.connect(tracking.tracking_uri())
        record = json.loads((self.out / stage / "training.json").read_text())
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

    def _pictures(self) -> list[Any]:
        import cv2

        from pipelines.reports import report

        sets = []
        for low in sorted((self.out / "degraded").glob("*.png")):
            lr = _rgb(low)
            bicubic = cv2.resize(lr, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
            versions: dict[str, Any] = {"LR": lr, "Bicubic": bicubic}
            versions |= {label: self.out / "upscaled" / name / low.name for name, label in LABELS.items()}
            versions["HR"] = self.out / "hr" / low.name
            sets.append(report.PictureSet(low.stem.replace("-", " "), versions, shown=LABELS["tiny"]))
        folders = {label: self.out / "evaluation" / name for name, label in LABELS.items()}
        first = json.loads((next(iter(folders.values())) / "results.json").read_text())
        keys = [sample["key"] for sample in first["samples"]]
        return sets + report.evaluated_pictures(folders, keys[:: max(1, len(keys) // 4)][:4], shown=LABELS["tiny"])


def _rgb(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def _short(word: str, out: Path) -> str:
    """A word as it would be typed in the folder above `out`."""
    return os.path.relpath(word, out.parent) if os.path.isabs(word) else word


COMMAND = Command(DemoOptions, run, example="deedsr demo --out demo")
