"""Degraded crops of the shipped validation photographs, and what is measured of the pictures sampled from them."""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from benchmarks.perceptual import PerceptualDistance
from benchmarks.picture_measures import consistency
from deedsr.dataset.keys import generator
from deedsr.dataset.recipe import load_recipe
from deedsr.degradation.chain import degrade
from deedsr.degradation.draws import draw_degradation
from deedsr.metrics import niqe_set, psnr_y


class Pair(NamedTuple):
    hr: np.ndarray  # uint8 RGB (H, W, 3)
    lr: np.ndarray


def degraded_crops(count: int, side: int) -> list[Pair]:
    """Crops of `side` pixels from places spread over the photographs, each degraded once by DeeDSR's recipe."""
    recipe, found = load_recipe("deedsr"), []
    photos = sorted(Path(str(files("deedsr") / "assets/photos/validation")).glob("*.jpg"))
    for number in range(count):
        photo = cv2.cvtColor(cv2.imread(str(photos[number % len(photos)])), cv2.COLOR_BGR2RGB)
        rng = generator("benchmarks-sampled", number)
        top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
        hr = np.ascontiguousarray(photo[top : top + side, left : left + side])
        lr = degrade(hr, draw_degradation(recipe.degradation, hr.shape[:2], recipe.scale, rng))
        found.append(Pair(hr, lr))
    return found


@cache
def perceptual_distance() -> PerceptualDistance:
    return PerceptualDistance()


def quality(srs: Sequence[np.ndarray], pairs: Sequence[Pair]) -> dict[str, float]:
    """Means over the pictures, NIQE as one fit over all of them."""
    return {
        "consistency": float(np.mean([consistency(sr, pair.lr) for sr, pair in zip(srs, pairs, strict=True)])),
        "psnr_y": float(np.mean([psnr_y(sr, pair.hr) for sr, pair in zip(srs, pairs, strict=True)])),
        "niqe": niqe_set(srs),
        "perceptual": float(np.mean([perceptual_distance()(sr, pair.hr) for sr, pair in zip(srs, pairs, strict=True)])),
    }
