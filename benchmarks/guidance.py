"""Noise guidance as a dial between realism and fidelity.

    python -m benchmarks.guidance [--model tiny] [--seeds 8] [--steps N] [--figures docs/images]

Two dials: the number of guided steps at full strength, and the strength over the share of the steps that the model
recommends. Every seed samples a picture of its own at every position of both, always with the same noise. Consistency
(PSNR of the area-downsampled picture against the LR) has to rise along a dial: Spearman's rank correlation of position
and consistency, for each seed. PSNR-Y, NIQE (one fit over the pictures of a position) and the perceptual distance
(`benchmarks.perceptual`, needs `pip install -e ".[benchmarks]"`) stand beside it. `--figures` writes the curves and a
strip of pictures. Prints a table per dial and, last, one JSON line.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr

from benchmarks.picture_measures import consistency
from benchmarks.sampled import Pair, degraded_crops, quality
from deedsr import DeeDSRPipeline

GOAL = 0.9
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)  # 0 = the first step only
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CURVES = {
    "consistency": "consistency, dB",
    "psnr_y": "PSNR-Y, dB",
    "niqe": "NIQE (lower: more natural)",
    "perceptual": "perceptual distance to the HR",
}
WIDTHS = {"consistency": "12.2", "psnr_y": "9.2", "niqe": "8.2", "perceptual": "10.3"}  # in the table


def turn(pipe: Any, pairs: list[Pair], positions: list[dict[str, Any]]) -> list[list[np.ndarray]]:
    """The pictures at each position of a dial, one per seed."""
    return [
        [
            np.asarray(
                pipe(pair.lr, generator=torch.Generator().manual_seed(seed), restoration=1.0, **settings).images[0]
            )
            for seed, pair in enumerate(pairs)
        ]
        for settings in positions
    ]


def along(pictures: list[list[np.ndarray]], pairs: list[Pair]) -> dict[str, Any]:
    """Quality at each position, and each seed's rank correlation of position and consistency."""
    of_seed = np.array([[consistency(sr, pair.lr) for sr, pair in zip(srs, pairs, strict=True)] for srs in pictures])
    ranks = [float(spearmanr(range(len(pictures)), of_seed[:, seed]).statistic) for seed in range(len(pairs))]
    rows = [quality(srs, pairs) for srs in pictures]
    return {name: [row[name] for row in rows] for name in CURVES} | {"spearman": ranks}


def draw(dials: dict[str, tuple[tuple[float, ...], dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(dials), len(CURVES), figsize=(13, 5), layout="constrained")
    for row, (name, (positions, found)) in zip(axes, dials.items(), strict=True):
        for axis, (curve, label) in zip(row, CURVES.items(), strict=True):
            axis.plot(positions, found[curve], "o-", color="tab:blue")
            axis.set_xlabel(name)
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def strip(lr: np.ndarray, hr: np.ndarray, along_dial: list[np.ndarray], path: Path) -> None:
    """LR with its pixels as squares, the pictures along the dial, HR."""
    squares = cv2.resize(lr, hr.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    gap = np.full((hr.shape[0], 4, 3), 255, np.uint8)
    parts = [squares, *along_dial, hr]
    Image.fromarray(np.concatenate([part for picture in parts for part in (picture, gap)][:-1], axis=1)).save(
        path, quality=88
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, help="default: as the model recommends")
    parser.add_argument("--side", type=int, default=256, help="of a picture, pixels of the output")
    parser.add_argument("--shown", type=int, default=0, help="the seed whose pictures make the strip")
    parser.add_argument("--figures", type=Path, help="folder for guidance.png and guidance-strip.jpg")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pipe = DeeDSRPipeline.from_pretrained(asked.model)
    pipe.set_progress_bar_config(disable=True)
    pairs, steps = degraded_crops(asked.seeds, asked.side), asked.steps or pipe.sampling.num_inference_steps
    common = {"num_inference_steps": steps}
    by_share = turn(pipe, pairs, [common | {"noise_guidance": 1.0, "noise_guidance_share": s} for s in SHARES])
    by_strength = turn(pipe, pairs, [common | {"noise_guidance": s} for s in STRENGTHS])
    own = pipe.sampling.noise_guidance_share
    dials = {
        "share of the steps guided, strength 1": (SHARES, along(by_share, pairs)),
        f"strength, share {own:g}": (STRENGTHS, along(by_strength, pairs)),
    }
    print(f"{asked.model}, {steps} steps, {asked.seeds} seeds, a picture of {asked.side} px each")
    for name, (positions, found) in dials.items():
        print(f"\n{name:38}{'consistency':>12}{'PSNR-Y':>9}{'NIQE':>8}{'percept.':>10}")
        for number, position in enumerate(positions):
            print(
                f"{position:38g}"
                + "".join(
                    f"{found[c][number]:{w}f}" for c, w in zip(CURVES, ("12.2", "9.2", "8.2", "10.3"), strict=True)
                )
            )
        mean, lowest = float(np.mean(found["spearman"])), min(found["spearman"])
        print(f"Spearman of position and consistency: mean {mean:.3f}, lowest seed {lowest:.3f} (goal {GOAL})")
    if asked.figures:
        asked.figures.mkdir(parents=True, exist_ok=True)
        draw(dials, asked.figures / "guidance.png")
        shown = pairs[asked.shown]
        strip(shown.lr, shown.hr, [srs[asked.shown] for srs in by_share], asked.figures / "guidance-strip.jpg")
    result = {name: {"positions": positions} | found for name, (positions, found) in dials.items()}
    print(json.dumps({"model": asked.model, "steps": steps, "seeds": asked.seeds, "side": asked.side, "dials": result}))


if __name__ == "__main__":
    main()
