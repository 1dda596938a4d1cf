"""What each part of the method is worth: the full method against each ablation, equal steps, several seeds.

    python -m benchmarks.ablations --data SHARDS_OR_LATENTS --pairs SHARDS --learner MODEL --out FOLDER
        [--base tiny] [--steps 2000] [--seeds 3] [--arms full vector ...] [--limit N] [--set train.lr=1e-3 ...]

Every arm is a `deedsr train adapter --preset tiny` with a folder of its own and a `deedsr evaluate` on the validation
pairs, so a benchmark that was interrupted goes on where it was, and more steps or seeds can be asked for later. Arms:
the method without the learner's vector, without a branch, without DA blocks; the full method sampled without noise
guidance; and the other initialisation of the global branch, tokens projected to the base's own to_k and to_v.
The difference of an arm to the full method is taken pair by pair and seed by seed; its interval (95 %) is a bootstrap
over seeds and pairs. Goal: no ablation is better with its whole interval. The perceptual distance (lower is better)
needs `pip install -e ".[benchmarks]"`. Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.sampled import perceptual_distance

METRICS = {"psnr": 1, "ssim": 1, "perceptual": -1}  # of single pairs; 1: higher is better, -1: lower is
MEASURED = ("psnr", "ssim")  # by `deedsr evaluate`; the perceptual distance is measured on the pictures it leaves
DRAWS = 10_000


@dataclass(frozen=True)
class Arm:
    """`training`, `sampling`: words for `deedsr train adapter` and `deedsr evaluate`; `trained_as`: another arm whose
    training it shares."""

    training: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()
    trained_as: str | None = None


ARMS = {
    "full": Arm(),
    "vector": Arm(("--model.ablate", "vector")),
    "global": Arm(("--model.ablate", "global")),
    "local": Arm(("--model.ablate", "local")),
    "da": Arm(("--model.ablate", "da")),
    "guidance": Arm(sampling=("--noise-guidance", "0"), trained_as="full"),
    "project": Arm(("--model.tokens", "project")),
}


def deedsr(out: Path, *words: str) -> None:
    """Runs a command; its log goes to stderr, its runs into a store of this benchmark."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{out.resolve()}/mlflow.db"}
    done = subprocess.run([sys.executable, "-m", "deedsr", *words], env=environment, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"`deedsr {words[0]}` failed: it says above why; the same command goes on from here")


def measured(asked: argparse.Namespace, name: str, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics of an arm and of bicubic by pair: trained and evaluated now, or as an earlier call left them."""
    arm = ARMS[name]
    model = asked.out / f"{arm.trained_as or name}-{seed}"
    found = asked.out / "evaluations" / f"{name}-{seed}-{asked.steps}-{asked.limit or 'all'}"
    if not (found / "results.json").is_file():
        more = [word for setting in asked.set for word in (f"--{setting.partition('=')[0]}", setting.partition("=")[2])]
        deedsr(
            asked.out,
            *("train", "adapter", "--preset", "tiny", "--register-as", "null", "--train.validate_every", "0"),
            *("--data", asked.data, "--learner", asked.learner, "--base", asked.base, "--out", str(model)),
            *("--train.seed", str(seed), "--train.max_steps", str(asked.steps), *more, *arm.training),
        )
        limit = ["--limit", str(asked.limit)] if asked.limit else []
        deedsr(
            asked.out,
            *("evaluate", "--model", str(model), "--data", asked.pairs, "--out", str(found), *limit, *arm.sampling),
            *("--metrics", ",".join(MEASURED)),
        )
    samples = json.loads((found / "results.json").read_text())["samples"]
    rows = {sample["key"]: sample["metrics"] for sample in samples}
    for key, distances in perceptual(found, samples).items():
        for method, distance in distances.items():
            rows[key][method]["perceptual"] = distance
    return rows


def perceptual(found: Path, samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Distance to the HR of the pictures of an evaluation, by pair and method; kept beside them."""
    kept = found / "perceptual.json"
    if not kept.is_file():
        distance = perceptual_distance()
        path = lambda sample, name: str(found / sample["pictures"][name])
        picture = lambda sample, name: cv2.cvtColor(cv2.imread(path(sample, name)), cv2.COLOR_BGR2RGB)
        rows = {
            sample["key"]: {
                method: distance(picture(sample, method), picture(sample, "hr")) for method in sample["metrics"]
            }
            for sample in samples
        }
        kept.with_suffix(".part").write_text(json.dumps(rows))
        kept.with_suffix(".part").replace(kept)
    return json.loads(kept.read_text())


def difference(arm_SP: np.ndarray, full_SP: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of `arm - full`, by bootstrap over seeds S and pairs P."""
    difference_SP = arm_SP - full_SP
    rng = np.random.default_rng(0)
    seeds, pairs = difference_SP.shape
    drawn = np.empty(DRAWS)
    for i in range(DRAWS):
        rows = rng.integers(seeds, size=seeds)
        drawn[i] = difference_SP[rows][:, rng.integers(pairs, size=pairs)].mean()
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(difference_SP.mean()), float(low), float(high)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="what is trained on")
    parser.add_argument("--pairs", required=True, help="pixel shards whose validation split is measured")
    parser.add_argument("--learner", required=True)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="beside full")
    parser.add_argument("--limit", type=int, help="validation pairs at most")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of every training")
    return parser.parse_args()


def main() -> None:
    asked = parsed()
    asked.out.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(["full", *asked.arms]))
    by_arm = {name: [measured(asked, name, seed) for seed in range(asked.seeds)] for name in names}
    keys = sorted(by_arm["full"][0])

    def table(name: str, metric: str, method: str = "model") -> np.ndarray:
        return np.array([[pairs[key][method][metric] for key in keys] for pairs in by_arm[name]])

    print(
        f"tiny, {asked.steps} steps, {asked.seeds} seeds, {len(keys)} validation pairs; differences to the full method"
    )
    print(f"{'without':12}" + "".join(f"{metric:>10}{'difference':>12}{'95 %':>22}" for metric in METRICS))
    bicubic = {metric: float(table("full", metric, "bicubic").mean()) for metric in METRICS}
    print(f"{'(bicubic)':12}" + "".join(f"{bicubic[metric]:10.4f}{'':34}" for metric in METRICS))
    result: dict[str, Any] = {"bicubic": bicubic}
    better = []
    for name in names:
        result[name] = {}
        line = f"{name if name != 'full' else '(full)':12}"
        for metric in METRICS:
            values = table(name, metric)
            mean, low, high = difference(values, table("full", metric))
            result[name][metric] = {"mean": float(values.mean()), "difference": mean, "interval": [low, high]}
            interval = f"{low:+.4f} .. {high:+.4f}"
            line += f"{values.mean():10.4f}" + (f"{mean:+12.4f}{interval:>22}" if name != "full" else f"{'':34}")
            if min(METRICS[metric] * low, METRICS[metric] * high) > 0:
                better.append(f"{name} by {metric}")
        print(line)
    print(f"better than the full method: {', '.join(better) or 'none'} (goal: none)")
    print(
        json.dumps({"steps": asked.steps, "seeds": asked.seeds, "pairs": len(keys), "arms": result, "better": better})
    )


if __name__ == "__main__":
    main()
