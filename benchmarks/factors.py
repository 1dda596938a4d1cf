"""What `upscale --factor` costs in figures: results of other factors than the model's, on real pairs of factor 4.

    python -m benchmarks.factors --lr DIR --hr DIR --limit 8 [--model tiny]

The truth of factor 1, 2 and 3 is the HR reduced by averaging areas. Of factor 8 it is the HR itself, and the input the
LR reduced by areas to half. `area` and `Lanczos` reduce the model's result; `none` is the bicubic input. PSNR-Y and
SSIM-Y as in `deedsr evaluate`.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from deedsr.metrics import psnr_y, ssim_y
from deedsr.sampling.images import to_tensors
from pipelines.inference.evaluator import read_pixels
from pipelines.inference.parts import files_given
from pipelines.inference.sampler import Sampler
from pipelines.models import Model

FACTORS = (1, 2, 3, 4, 8)
SCALE = 4


def resized(picture: np.ndarray, size: tuple[int, int], way: int) -> np.ndarray:
    return picture if picture.shape[1::-1] == size else cv2.resize(picture, size, interpolation=way)


def lanczos(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """With a window as wide as the reduction asks for, which OpenCV's has not."""
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def results(lr: np.ndarray, hr: np.ndarray, enlarge: Sampler) -> dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """By factor and way: the result and the truth."""

    def model(picture: np.ndarray) -> np.ndarray:
        made = enlarge(to_tensors(picture)[0], torch.Generator().manual_seed(0), "")
        return (made.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)

    full, found = model(lr), {}
    for factor in FACTORS:
        given, made = lr, full
        if factor > SCALE:
            given = resized(lr, (lr.shape[1] * SCALE // factor, lr.shape[0] * SCALE // factor), cv2.INTER_AREA)
            made = model(resized(given, lr.shape[1::-1], cv2.INTER_CUBIC))
        size = (given.shape[1] * factor, given.shape[0] * factor)
        truth = resized(hr, size, cv2.INTER_AREA)
        ways = {"none": resized(given, size, cv2.INTER_CUBIC), "area": resized(made, size, cv2.INTER_AREA)}
        if factor < SCALE:
            ways["Lanczos"] = lanczos(made, size)
        found[factor] = {way: (picture, truth) for way, picture in ways.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", required=True, help="folder, as --data of `deedsr evaluate`")
    parser.add_argument("--hr", required=True, help="folder, as its --reference")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--limit", type=int, default=8)
    asked = parser.parse_args()
    model = Model.find(asked.model)
    sampler = Sampler(model, model.description.sampling, "auto", "fp32")
    figures: dict[str, list[tuple[float, float]]] = {}
    for part in tqdm(files_given(asked.lr, asked.hr, (), SCALE, asked.limit).parts, mininterval=10):
        pair = [read_pixels(part.files[name]) for name in ("lr", "hr")]
        for factor, ways in results(*pair, sampler).items():
            for way, (picture, truth) in ways.items():
                figures.setdefault(f"{factor} {way}", []).append((psnr_y(picture, truth), ssim_y(picture, truth)))
    means = {name: [round(float(value), 4) for value in np.mean(values, 0)] for name, values in figures.items()}
    for name, (psnr, ssim) in means.items():
        print(f"{name:12} {psnr:7.2f} {ssim:7.4f}")
    print(json.dumps({"benchmark": "factors", "model": asked.model, "lr": Path(asked.lr).name, "figures": means}))


if __name__ == "__main__":
    main()
