"""What sampling saves against the paper's procedure written down step by step, and what a second-order solver saves.

    python -m benchmarks.sampling [--model tiny] [--tables savings solvers]

`transcription` below is the paper's section 4 as its authors run it: one picture after the other, learner and
degradation kernels at every step, the first answer of the UNet computed and thrown away, large pictures cut into tiles
that are sampled one after the other. It has the pipeline's weights, threads, number type and inference mode; its
savings are then made one by one. The second table is of solvers, all through the pipeline: the paper's 50 steps of DDIM
against 15 of DPM-Solver++, beside what the model recommends. Savings are told in operations, which other work on the
machine does not change, and in processor seconds of one thread, medians over rounds in turns. Prints two tables and,
last, one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate, pad
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sampled import Pair, degraded_crops, quality
from deedsr import DeeDSRPipeline
from deedsr.sampling.autoencoder import decode_latents, encode_latents
from deedsr.sampling.color_fix import fix_color

SCALE = 4
PAD = 64  # pixels of the output: sides become multiples
STRIDE = 800 / 1024  # of a tile's side
STEPS, ETA = 50, 1.0
SPEED_GOAL = 3
SOLVERS: dict[str, dict[str, Any]] = {
    "DDIM, 50 steps, eta 1 (paper)": {"num_inference_steps": 50, "noise_guidance_share": 0.0, "eta": 1.0},
    "DDIM, 50 steps, eta 0": {"num_inference_steps": 50, "noise_guidance_share": 0.0, "eta": 0.0},
    "DDIM, 15 steps, eta 0": {"num_inference_steps": 15, "noise_guidance_share": 0.0, "eta": 0.0},
    "DPM, 15 steps, eta 0": {"num_inference_steps": 15, "noise_guidance_share": 0.0, "eta": 0.0, "solver": "dpm"},
    "DPM, 15 steps, eta 1": {"num_inference_steps": 15, "noise_guidance_share": 0.0, "eta": 1.0, "solver": "dpm"},
    "as the model recommends": {},
    "the same, DPM, 15 steps": {"num_inference_steps": 15, "solver": "dpm"},
}


def transcription(
    pipe: Any, lr_CHW: torch.Tensor, tile: int = 1024, seed: int = 0, savings: tuple[str, ...] = ()
) -> torch.Tensor:
    """One LR picture (3, H, W) in [0, 1] to (3, 4 H, 4 W) in [0, 1]. `tile`: side in pixels of the output."""
    noise = torch.Generator().manual_seed(seed)
    lr = lr_CHW[None]
    enlarged = interpolate(lr, scale_factor=SCALE, mode="bicubic", align_corners=False).clamp(0, 1)
    height, width = enlarged.shape[2:]
    if height % PAD or width % PAD:  # a whole 64 more on a side that was a multiple already
        enlarged = pad(enlarged, (0, PAD - width % PAD, 0, PAD - height % PAD), mode="reflect")
    if max(height, width) <= tile:
        return sample(pipe, lr, enlarged, noise, savings)[0, :, :height, :width].clamp(0, 1)
    total, count = torch.zeros_like(enlarged), torch.zeros_like(enlarged)
    for top, left in corners(*enlarged.shape[2:], tile):
        place = (..., slice(top, top + tile), slice(left, left + tile))
        total[place] += sample(pipe, lr, enlarged[place], noise, savings)
        count[place] += 1
    return (total / count)[0, :, :height, :width].clamp(0, 1)


def corners(height: int, width: int, tile: int) -> Iterator[tuple[int, int]]:
    """Top left corners; the last tile of a row or column ends at the border."""
    tops, lefts = (
        [*range(0, max(side - tile, 0), int(STRIDE * tile)), max(side - tile, 0)] for side in (height, width)
    )
    return ((top, left) for top in tops for left in lefts)


def sample(
    pipe: Any, lr: torch.Tensor, enlarged: torch.Tensor, noise: torch.Generator, savings: tuple[str, ...]
) -> torch.Tensor:
    """An enlarged LR or tile of one (1, 3, H, W) in [0, 1] to the sampled picture in its colours."""
    z_lr = encode_latents(pipe.vae, 2 * enlarged - 1)  # the mode: a sample of the posterior costs the same
    draw = lambda: torch.randn(z_lr.shape, generator=noise)
    abars = pipe.scheduler.alphas_cumprod
    times = [1 + step * (1000 // STEPS) for step in reversed(range(STEPS))]
    x = draw()
    for number, t in enumerate(times):
        abar = abars[t]
        before = abars[times[number + 1]] if number + 1 < STEPS else abars[0]
        if number == 0 or "learner" not in savings:
            vector = pipe.learner(lr)
        if number == 0 or "kernels" not in savings:
            degradation = pipe.adapter.condition_encoder.prepare(vector)
        if number == 0:  # noise guidance
            if "first call" not in savings:
                pipe.adapter(x, t, z_lr, degradation)
            x_0, eps = z_lr, (x - abar.sqrt() * z_lr) / (1 - abar).sqrt()
        else:
            output = pipe.adapter(x, t, z_lr, degradation)
            x_0, eps = both(pipe.scheduler.config["prediction_type"], output, x, abar)
        sigma = ETA * ((1 - before) / (1 - abar) * (1 - abar / before)).sqrt()
        x = before.sqrt() * x_0 + (1 - before - sigma**2).sqrt() * eps + sigma * draw()
    picture = decode_latents(pipe.vae, x) / 2 + 0.5
    fix_color("adain", picture, lambda rows: enlarged[:, :, rows])
    return picture


def both(prediction: str, output: torch.Tensor, x: torch.Tensor, abar: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Clean latent and noise that the UNet's answer stands for; the paper's UNet answers with the noise."""
    if prediction == "epsilon":
        return (x - (1 - abar).sqrt() * output) / abar.sqrt(), output
    return abar.sqrt() * x - (1 - abar).sqrt() * output, abar.sqrt() * output + (1 - abar).sqrt() * x


class Cost(NamedTuple):
    seconds: float
    operations: float  # multiplications and additions, as torch counts them


def in_turns(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Cost]:
    """Operations, counted in a first round, and median processor seconds of the rounds after it."""
    operations, seconds = {}, {}
    for name, arm in arms.items():
        with FlopCounterMode(display=False) as counter:
            arm()
        operations[name], seconds[name] = counter.get_total_flops(), [0.0] * rounds
    for number in range(rounds):
        for name, arm in arms.items():
            began = time.process_time()
            arm()
            seconds[name][number] = time.process_time() - began
    return {name: Cost(statistics.median(seconds[name]), operations[name]) for name in arms}


@torch.inference_mode()
def measure_savings(pipe: Any, pairs: list[Pair], rounds: int) -> dict[str, Cost]:
    """Of one picture, of one picture among four, and of one in tiles."""
    lrs = [torch.from_numpy(pair.lr).permute(2, 0, 1) / 255 for pair in pairs[:4]]
    large, side = torch.cat([torch.cat(lrs[:2], 2), torch.cat(lrs[2:], 2)], 1), SCALE * lrs[0].shape[1]
    paper = {
        "num_inference_steps": STEPS,
        "noise_guidance_share": 0.0,
        "eta": ETA,
        "color_fix": "adain",
        "restoration": 1.0,
    }
    sampled = lambda given, **options: pipe(given, **paper, **options, output_type="pt")
    costs = in_turns(
        {
            "transcription": lambda: transcription(pipe, lrs[0]),
            "learner once": lambda: transcription(pipe, lrs[0], savings=("learner",)),
            "kernels and gates once, too": lambda: transcription(pipe, lrs[0], savings=("learner", "kernels")),
            "no call thrown away, too": lambda: transcription(
                pipe, lrs[0], savings=("learner", "kernels", "first call")
            ),
            "the pipeline": lambda: sampled(lrs[0]),
            "the pipeline, four together": lambda: sampled(lrs),
            "in tiles: transcription": lambda: transcription(pipe, large, tile=side),
            "in tiles: the pipeline": lambda: sampled(large, tile=side),
        },
        rounds,
    )
    four = costs["the pipeline, four together"]
    return costs | {"the pipeline, four together": Cost(four.seconds / 4, four.operations / 4)}


def measure_solvers(pipe: Any, pairs: list[Pair]) -> dict[str, dict[str, float]]:
    """Seconds per picture and quality of every solver, on the same noise."""
    found = {}
    for name, settings in SOLVERS.items():
        began = time.process_time()
        srs = [
            np.asarray(
                pipe(pair.lr, generator=torch.Generator().manual_seed(seed), restoration=1.0, **settings).images[0]
            )
            for seed, pair in enumerate(pairs)
        ]
        seconds = (time.process_time() - began) / len(pairs)
        found[name] = {"seconds": seconds} | quality(srs, pairs)
    return found


def solver_table(pipe: Any, asked: argparse.Namespace) -> dict[str, Any]:
    solvers = measure_solvers(pipe, degraded_crops(asked.pictures, asked.side))
    paper, fast = (solvers[name] for name in ("DDIM, 50 steps, eta 1 (paper)", "DPM, 15 steps, eta 1"))
    print(f"{asked.pictures} pictures of {asked.side} px")
    print(f"{'':34}{'s/picture':>10}{'times faster':>14}{'consistency':>13}{'PSNR-Y':>8}{'NIQE':>7}{'percept.':>10}")
    for name, row in solvers.items():
        print(
            f"{name:34}{row['seconds']:10.2f}{paper['seconds'] / row['seconds']:14.2f}"
            f"{row['consistency']:13.2f}{row['psnr_y']:8.2f}{row['niqe']:7.2f}{row['perceptual']:10.3f}"
        )
    speed, gain = paper["seconds"] / fast["seconds"], fast["consistency"] - paper["consistency"]
    print(
        f"DPM 15 against DDIM 50: {speed:.2f} times faster (goal {SPEED_GOAL}), consistency {gain:+.2f} dB (goal 0)\n"
    )
    return {"solvers": solvers, "speed": speed, "consistency_gain": gain}


def savings_table(pipe: Any, asked: argparse.Namespace) -> dict[str, Any]:
    costs = measure_savings(pipe, degraded_crops(4, asked.savings_side), asked.rounds)
    title = f"{asked.savings_side} px, {STEPS} steps, per picture"
    print(f"{title:34}{'GFLOP':>10}{'share':>9}{'seconds':>10}{'share':>9}")
    for name, cost in costs.items():
        against = costs["in tiles: transcription" if name.startswith("in tiles") else "transcription"]
        print(
            f"{name:34}{cost.operations / 1e9:10.2f}{cost.operations / against.operations:9.1%}"
            f"{cost.seconds:10.3f}{cost.seconds / against.seconds:9.1%}"
        )
    print("share: of the transcription")
    return {"savings": {name: cost._asdict() for name, cost in costs.items()}}


TABLES = {"savings": savings_table, "solvers": solver_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=3, help="in which savings are measured")
    parser.add_argument("--savings-side", type=int, default=128, help="of a picture, pixels of the output")
    parser.add_argument("--side", type=int, default=256, help="of a picture on which solvers are judged")
    parser.add_argument("--pictures", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pipe = DeeDSRPipeline.from_pretrained(asked.model)
    pipe.set_progress_bar_config(disable=True)
    result = vars(asked)
    for table in asked.tables:
        result |= TABLES[table](pipe, asked)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
