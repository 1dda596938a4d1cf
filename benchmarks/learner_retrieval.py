"""Does the degradation learner see degradation? Nearest neighbour of one LR quadrant among 64 candidates.

    python -m benchmarks.learner_retrieval [--learner FOLDER] [--recipe deedsr]

The query is one quadrant of an LR image, the right candidate another quadrant of the same image. The 63 wrong ones are
quadrants (i) of other crops under other degradations, (ii) of the right candidate's own content under 63 other
degradations: only (ii) cannot be solved by looking at the content. Crops come from the shipped validation photographs.
Beside the learner: the same network untrained, a colour histogram, and raw patch statistics (mean, variance,
Laplacian, blockiness). Intervals: 95 % bootstrap over contents.
"""

import argparse
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
import torch

from deedsr.dataset.keys import generator
from deedsr.dataset.recipe import load_recipe
from deedsr.degradation.chain import degrade
from deedsr.degradation.draws import draw_degradation
from deedsr.learner.resnet import DegradationLearner

SIDE, CANDIDATES = 512, 64
Features = Callable[[np.ndarray], np.ndarray]  # (B,H,W,3) uint8 -> (B,D), compared by cosine or distance


def contents(count: int) -> list[np.ndarray]:
    """HR crops of the validation photographs on a half-overlapping grid, the most textured first."""
    crops = []
    for path in sorted(Path(str(files("deedsr") / "assets/photos/validation")).glob("*.jpg")):
        photo = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        for top in range(0, photo.shape[0] - SIDE + 1, SIDE // 3):
            for left in range(0, photo.shape[1] - SIDE + 1, SIDE // 2):
                crops.append(photo[top : top + SIDE, left : left + SIDE])
    crops.sort(key=lambda c: -cv2.Laplacian(cv2.cvtColor(c, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())
    return crops[:: max(1, len(crops) // count)][:count]


def quadrant(lr: np.ndarray, number: int) -> np.ndarray:
    half = lr.shape[0] // 2
    row, column = divmod(int(number), 2)
    return lr[row * half : (row + 1) * half, column * half : (column + 1) * half]


def pairs(crop: np.ndarray, recipe, name: str, content: int, fixed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(query, key) quadrants of 64 degradations of one crop; `fixed`: the same two quadrants in all of them."""
    queries, keys = [], []
    pick = generator("learner-retrieval", name, content)
    places = pick.choice(4, size=2, replace=False)
    for number in range(CANDIDATES):
        rng = generator("learner-retrieval", name, content, number)
        lr = degrade(crop, draw_degradation(recipe.degradation, crop.shape[:2], recipe.scale, rng))
        a, b = places if fixed else pick.choice(4, size=2, replace=False)
        queries.append(quadrant(lr, a))
        keys.append(quadrant(lr, b))
    return np.stack(queries), np.stack(keys)


def network(model: torch.nn.Module) -> Features:
    model.eval()

    def features(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            batches = [
                model.embed(torch.from_numpy(images[i : i + 64]).permute(0, 3, 1, 2).float() / 255).numpy()
                for i in range(0, len(images), 64)
            ]
        return np.concatenate(batches)

    return features


def colour_histogram(images: np.ndarray) -> np.ndarray:
    """Root of a 4x4x4 RGB histogram, so that the dot product is the Bhattacharyya coefficient."""
    code = (images.astype(int) // 64) @ np.array([16, 4, 1])
    counts = np.stack([np.bincount(c.ravel(), minlength=64) for c in code])
    return np.sqrt(counts / counts.sum(1, keepdims=True))


def patch_statistics(images: np.ndarray) -> np.ndarray:
    """Mean, variance, variance of the Laplacian, blockiness (jump across 8-pixel borders against elsewhere)."""
    rows = []
    for image in images:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64)
        jump = np.abs(np.diff(grey, axis=1)).mean(0)
        border = (np.arange(len(jump)) % 8) == 7
        block = jump[border].mean() / (jump[~border].mean() + 1e-3)
        lap = cv2.Laplacian(grey, cv2.CV_64F).var()
        rows.append([grey.mean() / 64, np.log(grey.var() + 1), np.log(lap + 1), block])
    return np.array(rows)


def similarity(q: np.ndarray, k: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """(Q,K): negative distance of standardised statistics where `scale` is given, else the dot product."""
    if scale is None:
        return q @ k.T
    return -np.linalg.norm(q[:, None] / scale - k[None] / scale, axis=2)


def hits_other_content(q: np.ndarray, k: np.ndarray, content: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    scores = similarity(q, k, scale)
    hits = np.zeros(len(q), bool)
    for i in range(len(q)):
        others = np.flatnonzero(content != content[i])
        wrong = generator("learner-retrieval", "wrong", i).choice(others, CANDIDATES - 1, replace=False)
        hits[i] = scores[i, i] > scores[i, wrong].max()
    return hits


def interval(hits: np.ndarray, content: np.ndarray) -> tuple[float, float, float]:
    """Share in percent with its 95 % bootstrap interval over contents."""
    per_content = np.array([hits[content == c].mean() for c in np.unique(content)])
    rng = generator("learner-retrieval", "bootstrap")
    means = [rng.choice(per_content, len(per_content)).mean() for _ in range(2000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * hits.mean(), 100 * low, 100 * high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learner", default=str(files("deedsr") / "assets/tiny/learner"), help="learner folder")
    parser.add_argument("--recipe", default="deedsr")
    parser.add_argument("--contents", type=int, default=24, help="crops, each under 64 degradations")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    recipe = load_recipe(args.recipe)
    trained = DegradationLearner.from_pretrained(args.learner).float()
    torch.manual_seed(0)
    arms: dict[str, Features] = {
        "learner": network(trained),
        "untrained network": network(DegradationLearner.from_config(trained.config)),
        "colour histogram": colour_histogram,
        "patch statistics": patch_statistics,
    }

    crops = contents(args.contents)
    same = [pairs(crop, recipe, "same", i, fixed=True) for i, crop in enumerate(crops)]
    same_content = np.repeat(np.arange(len(crops)), CANDIDATES)
    varied = [pairs(crop, recipe, "varied", i, fixed=False) for i, crop in enumerate(crops)]
    queries, keys = (np.concatenate(images) for images in zip(*varied, strict=True))

    result: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, features in arms.items():
        q, k = features(queries), features(keys)
        scale = k.std(0) + 1e-9 if name == "patch statistics" else None
        other = hits_other_content(q, k, same_content, scale)
        hits = []
        for q_images, k_images in same:
            q, k = features(q_images), features(k_images)
            scores = similarity(q, k, scale)
            hits.append(scores.argmax(1) == np.arange(CANDIDATES))
        result[name] = {
            "other contents": interval(other, same_content),
            "same content": interval(np.concatenate(hits), same_content),
        }

    print(f"{len(same_content)} queries per column, {CANDIDATES} candidates, recipe {args.recipe}, % found first")
    print(f"{'':20}{'(i) other contents':>26}{'(ii) same content':>26}")
    for name, row in result.items():
        cells = "".join(f"{mean:8.1f} [{low:5.1f}, {high:5.1f}]".rjust(26) for mean, low, high in row.values())
        print(f"{name:20}{cells}")
    print(json.dumps({"benchmark": "learner_retrieval", "queries": len(same_content), "result": result}))


if __name__ == "__main__":
    main()
