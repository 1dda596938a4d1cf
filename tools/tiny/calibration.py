"""Calibration of a model's restoration gate on pairs of the bank and as many mild ones.

For every pair the sampled picture is blended with the bicubic enlargement at each of SHARES. Wanted is the share that
costs least, by the logarithms of EfficientNet-Lite1's distance and of the squared error, each over bicubic's, of the
noise in flat areas over the HR's, as far as it is more, and of the HR's detail over the picture's, as far as that is
less.

A few hundred pairs are too few to fit all of the gate's weights to the cost. The harm of the whole sampled picture, the
cost without the last term, is predicted from the vector by ridge regression, its penalty found by cross-validation; the
gate follows this prediction, with the slope and the offset of least cost (interpolated between the shares).
Shape suffixes: N pairs, S shares, D degradation vector.
"""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import avg_pool2d, interpolate
from tqdm import tqdm

from benchmarks.picture_measures import FLAT, patch_deviations
from deedsr import DeeDSRPipeline
from deedsr.errors import UsageError
from deedsr.hub.model_folder import find_folder
from deedsr.hub.weights import base_digest, part_digest
from deedsr.sampling.gate import RestorationGate, blend
from deedsr.sampling.images import enlarge, to_uint8
from tools.tiny.bank import RECIPES, Part, write
from tools.tiny.features import Perceptual
from tools.tiny.photographs import to_signed
from tools.tiny.training import Budget

MEASURES = ("distance", "error", "noise", "softness")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
ERROR_WEIGHT, NOISE_WEIGHT, SOFTNESS_WEIGHT = 0.5, 1.0, 1.0  # beside the distance's 1
NOISE_FLOOR = 0.5  # 8-bit levels that nobody sees
FLAT_PATCHES = 8  # of the HR, at least: else nothing is said about noise
FOLDS = 5
PENALTIES = (300.0, 1000.0, 3000.0)
SLOPES, OFFSETS = np.arange(0, 8.1, 0.5), np.arange(-2, 2.1, 0.2)
BATCH = 4  # pictures at a time


def measurements(work: Path, model: Path | str) -> Path:
    """Folder of the MEASURES of this model's pictures: those of other weights lie beside."""
    folder = find_folder(model)
    parts = base_digest(folder) + "".join(part_digest(folder / name) for name in ("learner", "adapter"))
    return work / "gate" / hashlib.sha256(parts.encode()).hexdigest()[:12]


def targets(work: Path, model: Path | str, chunks: int) -> dict[Path, Path]:
    """Where the MEASURES of each file of pairs belong: of the first `chunks` of each kind."""
    found = [path for name in RECIPES for path in sorted((work / name).glob("*.safetensors"))[:chunks]]
    folder = measurements(work, model)
    return {path: folder / f"{path.parent.name}-{path.name}" for path in found}


def measured(work: Path, model: Path | str, chunks: int) -> bool:
    return all(path.exists() for path in targets(work, model, chunks).values())


@torch.no_grad()
def measure(work: Path, model: Path | str, chunks: int, budget: Budget, part: Part = (0, 1)) -> None:
    """Write the MEASURES of every pair at every share, of `part[1]` processes those of process `part[0]`."""
    pipeline = DeeDSRPipeline.from_pretrained(model, torch_dtype=torch.float32).to(budget.device)
    pipeline.set_progress_bar_config(disable=True)
    perceptual = Perceptual().to(budget.device)
    began = time.monotonic()
    for file, path in tqdm([*targets(work, model, chunks).items()][part[0] :: part[1]], desc="gate", mininterval=10):
        if path.exists():
            continue
        if time.monotonic() - began > 60 * budget.minutes:
            return
        pairs = load_file(file)
        costs = []
        for first in range(0, len(pairs["hr"]), BATCH):
            hr = to_signed(pairs["hr"][first : first + BATCH].to(budget.device))
            lr = pairs["lr"][first : first + BATCH].to(budget.device).float() / 255
            seeds = [torch.Generator().manual_seed(first + number) for number in range(len(lr))]
            sampled = pipeline(list(lr), restoration=1.0, generator=seeds, output_type="pt").images
            bicubic = enlarge(lr, pipeline.scale)
            pictures = [2 * blended(sampled, bicubic, share, pipeline.scale) - 1 for share in SHARES]
            distances = perceptual(hr, *pictures)
            errors = [(picture - hr).square().mean((1, 2, 3)) for picture in pictures]
            noises, softnesses = excess_noise(pictures, hr), softness(pictures, hr, pipeline.scale)
            costs.append(torch.stack([torch.stack(distances, 1), torch.stack(errors, 1), noises, softnesses]).cpu())
        measures = dict(zip(MEASURES, torch.cat(costs, 1), strict=True))
        write(path, measures | {"degradation": pairs["degradation"]})


def blended(sampled_BCHW: torch.Tensor, bicubic_BCHW: torch.Tensor, share: float, scale: int) -> torch.Tensor:
    picture_BCHW = sampled_BCHW.clone()
    blend(
        picture_BCHW, lambda rows: bicubic_BCHW[:, :, rows], picture_BCHW.new_full((len(picture_BCHW),), share), scale
    )
    return picture_BCHW


def softness(pictures: list[torch.Tensor], hr_BCHW: torch.Tensor, scale: int) -> torch.Tensor:
    """Logarithm (B, S) of the detail in the HR over that in the picture, where it is less; all in [-1, 1].

    Detail is the mean deviation of pixels from the average over their LR pixel.
    """

    def detail_B(x_BCHW: torch.Tensor) -> torch.Tensor:
        averages = interpolate(avg_pool2d(x_BCHW, scale), scale_factor=scale)
        return (x_BCHW - averages).abs().mean((1, 2, 3)) + 1e-3

    return torch.stack([(detail_B(hr_BCHW) / detail_B(picture)).log().clamp_min(0) for picture in pictures], 1)


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


def fit(folder: Path) -> RestorationGate:
    """The gate of least expected cost by the measurements in `folder`; prints what it costs on pairs that it was not
    fitted to.
    """
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    if len(files) < 2:
        count = f"{folder} holds {len(files)} files of measured pairs"
        raise UsageError(f"{count}, two at least are needed: run bank first")
    fold_N = np.concatenate([np.full(len(file["error"]), number % FOLDS) for number, file in enumerate(files)])
    distance_NS, error_NS, noise_NS, softness_NS, vector_ND = (
        torch.cat([file[key] for file in files]).double().numpy() for key in (*MEASURES, "degradation")
    )
    relative = lambda x: np.log(np.maximum(x / x[:, :1], 1e-3))
    harm_NS = relative(distance_NS) + ERROR_WEIGHT * relative(error_NS) + NOISE_WEIGHT * noise_NS
    cost_NS = harm_NS + SOFTNESS_WEIGHT * softness_NS
    harm_N = harm_NS[:, -1] - harm_NS[:, 0]
    held_out = {}
    for penalty in PENALTIES:
        predicted_N, share_N = np.zeros(len(harm_N)), np.zeros(len(harm_N))
        for fold in range(FOLDS):
            inside = fold_N != fold
            predicted_N[~inside] = _predict(_regression(vector_ND[inside], harm_N[inside], penalty), vector_ND[~inside])
        for fold in range(FOLDS):
            inside = fold_N != fold
            slope, offset = _response(predicted_N[inside], cost_NS[inside])
            share_N[~inside] = _sigmoid(offset - slope * predicted_N[~inside])
        held_out[penalty] = (float(_cost(cost_NS, share_N).mean()), predicted_N, share_N)
    penalty = min(held_out, key=lambda key: held_out[key][0])
    cost, predicted_N, share_N = held_out[penalty]
    weights_D, constant = _regression(vector_ND, harm_N, penalty)
    slope, offset = _response(predicted_N, cost_NS)
    summary = {
        "pairs": len(cost_NS),
        "penalty": penalty,
        "correlation of the harm with what was predicted, held out": float(np.corrcoef(predicted_N, harm_N)[0, 1]),
        "cost at each share": dict(zip(SHARES, cost_NS.mean(0).tolist(), strict=True)),
        "cost with the gate, held out": cost,
        "cost with the best share of each pair": float(cost_NS.min(1).mean()),
        "shares, deciles": np.quantile(share_N, np.linspace(0, 1, 11)).tolist(),
    }
    print(json.dumps(summary, indent=1))
    weights = tuple(round(float(weight), 5) for weight in -slope * weights_D)
    return RestorationGate(weights, round(float(offset - slope * constant), 5))


def _regression(vector_ND: np.ndarray, harm_N: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Weights and constant of the ridge regression of the harm on the vector."""
    mean_D, mean = vector_ND.mean(0), harm_N.mean()
    centred_ND = vector_ND - mean_D
    penalised_DD = centred_ND.T @ centred_ND + penalty * np.eye(len(mean_D))
    weights_D = np.linalg.solve(penalised_DD, centred_ND.T @ (harm_N - mean))
    return weights_D, float(mean - mean_D @ weights_D)


def _predict(regression: tuple[np.ndarray, float], vector_ND: np.ndarray) -> np.ndarray:
    weights_D, constant = regression
    return vector_ND @ weights_D + constant


def _response(predicted_N: np.ndarray, cost_NS: np.ndarray) -> tuple[float, float]:
    """Slope and offset of `sigmoid(offset - slope * predicted harm)`, the share that costs least."""
    costs = {
        (slope, offset): _cost(cost_NS, _sigmoid(offset - slope * predicted_N)).mean()
        for slope in SLOPES
        for offset in OFFSETS
    }
    return min(costs, key=lambda key: costs[key])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _cost(cost_NS: np.ndarray, share_N: np.ndarray) -> np.ndarray:
    """Linear between the shares that were measured."""
    return np.array([np.interp(share, SHARES, costs) for share, costs in zip(share_N, cost_NS, strict=True)])
