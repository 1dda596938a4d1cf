"""A model on real pairs of photographs (RealSR, DRealSR), with the field's definitions of PSNR and NIQE.

    python -m benchmarks.real_pairs --lr DIR --hr DIR [--model tiny] [--settings JSON] [--every 4] [--sheet FILE]

The folders are the user's: pairs are matched by the order of their names. PSNR-Y and NIQE are as in `deedsr evaluate`,
the perceptual distance as in `benchmarks.tiny_figures`. Intervals are 95 % paired bootstraps over pictures. Results are
kept under `--work`.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.contact_sheet import centre, squares, write_sheet
from benchmarks.kept import Kept, fingerprint
from benchmarks.perceptual import PerceptualDistance
from benchmarks.picture_measures import consistency, interval
from benchmarks.realesrgan import RealESRGAN
from benchmarks.tiny_figures import CODE, PACKAGE, Pair, sampled, settings, weights
from deedsr.metrics import niqe, psnr_y
from pipelines.models import Model

SHEET_SIDE = 352
PEER = "RealESRGAN x4plus"


def read_pairs(lr: Path, hr: Path, every: int) -> list[Pair]:
    files = [sorted(path for path in folder.iterdir() if path.suffix.lower() == ".png") for folder in (lr, hr)]
    if not files[0] or len(files[0]) != len(files[1]):
        raise SystemExit(f"{lr} holds {len(files[0])} pictures, {hr} {len(files[1])}")
    read = lambda path: np.ascontiguousarray(cv2.imread(str(path))[..., ::-1])
    return [Pair(a.stem, read(b), read(a)) for a, b in zip(*files, strict=True)][::every]


def measured(picture: np.ndarray, hr: np.ndarray, perceptual: PerceptualDistance) -> dict[str, float]:
    return {
        "psnr_y": psnr_y(picture, hr),
        "niqe": niqe(picture),
        "perceptual": perceptual(picture, hr),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=Path, required=True)
    parser.add_argument("--hr", type=Path, required=True)
    parser.add_argument("--model", default="tiny", help="as for `deedsr evaluate`")
    parser.add_argument("--settings", type=settings, default={}, help="arguments of the pipeline, JSON")
    parser.add_argument("--every", type=int, default=1, help="only every so manieth pair")
    parser.add_argument("--peer", action="store_true", help="RealESRGAN x4plus, too")
    parser.add_argument("--sheet", type=Path, help="contact sheet of six pairs, .jpg or .png; implies --peer")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "real-pairs")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    pairs = read_pairs(asked.lr, asked.hr, asked.every)
    pipeline = Model.find(asked.model).load()
    pipeline.set_progress_bar_config(disable=True)
    kept, perceptual = Kept(asked.work), PerceptualDistance()
    model = fingerprint(*CODE, *weights(asked.model), asked.threads, asked.settings)
    methods: dict[str, Any] = {
        "bicubic": lambda pair: cv2.resize(pair.lr, pair.hr.shape[1::-1], interpolation=cv2.INTER_CUBIC),
        "model": lambda pair: kept.picture(
            fingerprint(model, pair.crop, pair.lr), lambda: sampled(pipeline, pair, asked.settings)
        ),
    }
    if asked.peer or asked.sheet:
        peer = RealESRGAN(asked.threads)
        methods[PEER] = lambda pair: kept.picture(fingerprint("peer", pair.lr), lambda: peer(pair.lr))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for pair in tqdm(pairs, mininterval=10):
        for name, method in methods.items():
            picture = method(pair)
            key = fingerprint("real pairs", PACKAGE / "metrics", picture, pair.hr)
            row = kept.row(key, lambda picture=picture, pair=pair: measured(picture, pair.hr, perceptual))
            rows[name].append(row | {"consistency": consistency(picture, pair.lr)})
    table = {name: {key: np.array([row[key] for row in found]) for key in found[0]} for name, found in rows.items()}
    bicubic, result = table["bicubic"], {}
    for name, columns in table.items():
        means = {key: round(float(values.mean()), 4) for key, values in columns.items()}
        lead = columns["psnr_y"] - bicubic["psnr_y"]
        distance = columns["perceptual"]
        against = {
            "psnr_y - bicubic": interval(lambda drawn, lead=lead: lead[drawn].mean(1), len(pairs)),
            "perceptual / bicubic": interval(
                lambda drawn, distance=distance: distance[drawn].sum(1) / bicubic["perceptual"][drawn].sum(1),
                len(pairs),
            ),
            "niqe": interval(lambda drawn, niqe=columns["niqe"]: niqe[drawn].mean(1), len(pairs)),
        }
        result[name] = means | {key: [round(end, 4) for end in ends] for key, ends in against.items()}
        print(f"{name:18} {json.dumps(result[name])}")
    if asked.sheet:
        shown = pairs[:: max(1, len(pairs) // 6)][:6]
        sheet = [
            [centre(picture, SHEET_SIDE) for picture in (squares(p.lr, 4), *(m(p) for m in methods.values()), p.hr)]
            for p in shown
        ]
        write_sheet(asked.sheet, ("LR", *methods, "HR"), sheet)
    print(json.dumps({"benchmark": "real_pairs", "model": asked.model, "pairs": len(pairs), "methods": result}))


if __name__ == "__main__":
    main()
