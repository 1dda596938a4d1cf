"""Pairs for the last stage, made once: HR crops with their degraded LR, its latent and its degradation vector.

Files of CHUNK pairs; those that exist are not made again. Pairs of `bank` have the teacher's pictures of the LRs as a
second target. In pairs of `mild` the LR says nearly all of the HR, which is their only target.
Shape suffixes: B batch, C channels, H W pixels, h w latent pixels, D degradation vector.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from deedsr import DeeDSRPipeline
from deedsr.dataset.assignment import assign_degradation
from deedsr.dataset.keys import generator
from deedsr.dataset.recipe import load_recipe
from deedsr.degradation.chain import degrade
from deedsr.sampling.autoencoder import encode_latents
from deedsr.sampling.images import enlarge
from tools.tiny.photographs import Photographs
from tools.tiny.training import Budget

Part = tuple[int, int]
SIDE, CHUNK = 256, 24  # pixels of an HR crop, pairs in a file
PROCESSED = ("camera", "light")  # strata of which half is processed as in a phone
RECIPES = {"mild": "docs/tiny/mild.yaml", "bank": "docs/tiny/pictures.yaml"}


def phone(lr: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Denoised, sharpened and saved as JPEG, as in a phone; uint8 RGB."""
    lr = cv2.bilateralFilter(lr, 5, rng.uniform(4, 25), rng.uniform(0.8, 2))
    amount = rng.uniform(0, 0.8)
    lr = cv2.addWeighted(lr, 1 + amount, cv2.GaussianBlur(lr, (0, 0), rng.uniform(0.6, 1.2)), -amount, 0)
    encoded = cv2.imencode(".jpg", lr[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))])[1]
    return np.ascontiguousarray(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))[..., ::-1])


@torch.no_grad()
def make_bank(
    photos: Path, work: Path, name: str, model: str, chunks: int, budget: Budget, part: Part = (0, 1)
) -> None:
    """Write the pairs under `work/name`, of `part[1]` processes those of process `part[0]`.

    `name` is one of RECIPES, `model` gives encoder and learner.
    """
    torch.set_num_threads(1)
    pipeline = DeeDSRPipeline.from_pretrained(model, torch_dtype=torch.float32).to(budget.device)
    recipe = load_recipe(Path(__file__).parents[2] / RECIPES[name])
    photographs = Photographs(photos, torch.device("cpu"))
    began = time.monotonic()
    for chunk in tqdm(range(chunks)[part[0] :: part[1]], desc=name, mininterval=10):
        path = work / name / f"{chunk:05d}.safetensors"
        if path.exists():
            continue
        if time.monotonic() - began > 60 * budget.minutes:
            return
        rng = generator("tiny pictures" if name == "bank" else f"tiny {name}", chunk)
        hr_BCHW = photographs.crops(CHUNK, SIDE, rng)
        lrs = []
        for number, hr in enumerate(hr_BCHW.permute(0, 2, 3, 1).numpy()):
            assigned = assign_degradation(recipe, f"{chunk}-{number}", 0, hr.shape[:2])
            lr = degrade(np.ascontiguousarray(hr), assigned.draws)
            if assigned.stratum in PROCESSED and rng.random() < 0.5:
                lr = phone(lr, rng)
            lrs.append(lr)
        lr_BCHW = torch.from_numpy(np.stack(lrs)).permute(0, 3, 1, 2).contiguous()
        seen = lr_BCHW.to(budget.device).float() / 255
        tensors = {
            "hr": hr_BCHW,
            "lr": lr_BCHW,
            "latent": encode_latents(pipeline.vae, 2 * enlarge(seen, recipe.scale) - 1).half(),
            "degradation": pipeline.learner(seen),
        }
        write(path, tensors)


def make_targets(work: Path, budget: Budget, part: Part = (0, 1)) -> None:
    """Write the teacher's picture of every LR in the bank, of `part[1]` processes those of process `part[0]`."""
    from benchmarks.realesrgan import RealESRGAN

    teacher = RealESRGAN(threads=1)
    began = time.monotonic()
    for file in tqdm(sorted((work / "bank").glob("*.safetensors"))[part[0] :: part[1]], desc="teacher", mininterval=10):
        path = work / "teacher" / file.name
        if path.exists():
            continue
        if time.monotonic() - began > 60 * budget.minutes:
            return
        lrs = load_file(file)["lr"].permute(0, 2, 3, 1).numpy()
        pictures = np.stack([teacher(np.ascontiguousarray(lr)) for lr in lrs])
        write(path, {"teacher": torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()})


def read_bank(work: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """All pairs, those of `bank` last, on the device: hr, lr, latent, degradation, and teacher, else the HR again."""
    paths = [path for name in RECIPES for path in sorted((work / name).glob("*.safetensors"))]
    if not paths:
        raise SystemExit(f"{work}/bank is empty: run the stage bank first")
    found: dict[str, list[torch.Tensor]] = {"hr": [], "lr": [], "latent": [], "degradation": [], "teacher": []}
    for path in paths:
        beside = work / "teacher" / path.name
        taught = path.parent.name == "bank" and beside.exists()
        pairs = load_file(path)
        pairs["teacher"] = load_file(beside)["teacher"] if taught else pairs["hr"]
        for name, parts in found.items():
            parts.append(pairs[name])
    return {name: torch.cat(parts).to(device) for name, parts in found.items()}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def spread(make: Callable[..., None], *arguments: Any, processes: int) -> None:
    """`make(*arguments, part)` in so many processes."""
    parts = [(number, processes) for number in range(processes)]
    if processes == 1:
        make(*arguments, parts[0])
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(make, *arguments, part) for part in parts]:
            done.result()
