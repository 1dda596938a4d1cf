"""Calibration of a model's restoration gate on the pairs of the bank.

For every pair the sampled picture is blended with the bicubic enlargement at each of SHARES. Wanted is the share that
costs least, by the logarithms of EfficientNet-Lite1's distance and of the squared error, each over bicubic's, and of
the noise in flat areas over the HR's, as far as it is more. The gate is fitted to that cost itself (between the shares
it is interpolated), with a ridge penalty chosen by cross-validation.
Shape suffixes: N pairs, S shares, D degradation vector.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.picture_measures import FLAT, patch_deviations
from deedsr import DeeDSRPipeline
from deedsr.sampling.gate import RestorationGate
from deedsr.sampling.images import enlarge, to_uint8
from tools.tiny.bank import write
from tools.tiny.features import Perceptual
from tools.tiny.photographs import to_signed
from tools.tiny.training import Budget

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
ERROR_WEIGHT, NOISE_WEIGHT = 0.5, 0.2  # beside the distance's 1
NOISE_FLOOR = 0.5  # 8-bit levels that nobody sees
FLAT_PATCHES = 8  # of the HR, at least: else nothing is said about noise
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
FOLDS, STEPS = 5, 400
BATCH = 4  # pictures at a time


@torch.no_grad()
def measure(work: Path, model: Path | str, budget: Budget) -> bool:
    """Write distance and squared error of every pair at every share; whether all pairs are measured."""
    pipeline = DeeDSRPipeline.from_pretrained(model, torch_dtype=torch.float32).to(budget.device)
    pipeline.set_progress_bar_config(disable=True)
    perceptual = Perceptual().to(budget.device)
    began = time.monotonic()
    for file in tqdm(sorted((work / "bank").glob("*.safetensors")), desc="gate", mininterval=10):
        path = work / "gate" / file.name
        if path.exists():
            continue
        if time.monotonic() - began > 60 * budget.minutes:
            return False
        pairs = load_file(file)
        costs = []
        for part in range(0, len(pairs["hr"]), BATCH):
            hr = to_signed(pairs["hr"][part : part + BATCH].to(budget.device))
            lr = pairs["lr"][part : part + BATCH].to(budget.device).float() / 255
            seeds = [torch.Generator().manual_seed(part + number) for number in range(len(lr))]
            sampled = pipeline(list(lr), restoration=1.0, generator=seeds, output_type="pt").images
            bicubic = enlarge(lr, pipeline.scale)
            pictures = [2 * torch.lerp(bicubic, sampled, share) - 1 for share in SHARES]
            distances = perceptual(hr, *pictures)
            errors = [(picture - hr).square().mean((1, 2, 3)) for picture in pictures]
            noises = excess_noise(pictures, hr)
            costs.append(torch.stack([torch.stack(distances, 1), torch.stack(errors, 1), noises]).cpu())
        distance, error, noise = torch.cat(costs, 1)
        write(path, {"distance": distance, "error": error, "noise": noise, "degradation": pairs["degradation"]})
    return True


def excess_noise(pictures: list[torch.Tensor], hr_BCHW: torch.Tensor) -> torch.Tensor:
    """Logarithm (B, S) of the noise in the HR's flat patches over the HR's own, where it is more; all in [-1, 1]."""
    arrays = lambda x: [to_uint8((one / 2 + 0.5).clamp(0, 1)) for one in x]
    hr = [patch_deviations(one) for one in arrays(hr_BCHW)]
    excess_BS = torch.zeros(len(hr), len(pictures), device=hr_BCHW.device)
    for column, picture in enumerate(pictures):
        for row, (one, own) in enumerate(zip(arrays(picture), hr, strict=True)):
            flat = own <= FLAT
            if flat.sum() >= FLAT_PATCHES:
                ratio = (patch_deviations(one)[flat].mean() + NOISE_FLOOR) / (own[flat].mean() + NOISE_FLOOR)
                excess_BS[row, column] = float(np.log(max(ratio, 1)))
    return excess_BS


def fit(work: Path) -> RestorationGate:
    """The gate of least expected cost; prints what it costs on pairs that it was not fitted to."""
    files = [load_file(path) for path in sorted((work / "gate").glob("*.safetensors"))]
    distance_NS, error_NS, noise_NS, vector_ND = (
        torch.cat([file[key] for file in files]) for key in ("distance", "error", "noise", "degradation")
    )
    relative = lambda x: (x / x[:, :1]).clamp_min(1e-3).log()
    cost_NS = relative(distance_NS) + ERROR_WEIGHT * relative(error_NS) + NOISE_WEIGHT * noise_NS
    fold_N = torch.cat([torch.full((len(file["error"]),), number % FOLDS) for number, file in enumerate(files)])
    held_out = {}
    for penalty in PENALTIES:
        shares_N = torch.zeros(len(cost_NS))
        for fold in range(FOLDS):
            inside = fold_N != fold
            weights_D, offset = _fitted(vector_ND[inside], cost_NS[inside], penalty)
            shares_N[~inside] = torch.sigmoid(vector_ND[~inside] @ weights_D + offset)
        held_out[penalty] = (float(_cost(cost_NS, shares_N).mean()), shares_N)
    penalty = min(held_out, key=lambda key: held_out[key][0])
    cost, shares_N = held_out[penalty]
    summary = {
        "pairs": len(cost_NS),
        "penalty": penalty,
        "cost at each share": dict(zip(SHARES, cost_NS.mean(0).tolist(), strict=True)),
        "cost with the gate, held out": cost,
        "cost with the best share of each pair": float(cost_NS.min(1).values.mean()),
        "shares, deciles": torch.quantile(shares_N, torch.linspace(0, 1, 11)).tolist(),
    }
    print(json.dumps(summary, indent=1))
    weights_D, offset = _fitted(vector_ND, cost_NS, penalty)
    return RestorationGate(tuple(round(w, 5) for w in weights_D.tolist()), round(float(offset), 5))


def _cost(cost_NS: torch.Tensor, share_N: torch.Tensor) -> torch.Tensor:
    """Linear between the shares that were measured."""
    place_N = share_N * (len(SHARES) - 1)
    below_N = place_N.detach().floor().long().clamp(0, len(SHARES) - 2)
    low_N, high_N = (cost_NS.gather(1, (below_N + step)[:, None])[:, 0] for step in (0, 1))
    return torch.lerp(low_N, high_N, place_N - below_N)


def _fitted(vector_ND: torch.Tensor, cost_NS: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    weights_D, offset = torch.zeros(vector_ND.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([weights_D, offset], lr=0.02)
    for _ in range(STEPS):
        optimizer.zero_grad()
        shares_N = torch.sigmoid(vector_ND @ weights_D + offset)
        (_cost(cost_NS, shares_N).mean() + penalty * weights_D.square().sum()).backward()
        optimizer.step()
    return weights_D.detach(), offset.detach()
