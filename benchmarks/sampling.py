"""What sampling saves against the paper's procedure written down step by step.

    python -m benchmarks.sampling [--model tiny]

`transcription` below is the paper's section 4 as its authors run it: one picture after the other, learner and
degradation kernels at every step, the first answer of the UNet computed and thrown away, pictures above 1024 pixels cut
into tiles that are sampled one after the other. It has the pipeline's weights, threads, number type and inference mode.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import interpolate

from deedsr.sampling.color_fix import adain
from deedsr.sampling.images import pad_reflect
from deedsr.sampling.latents import decode_latents, encode_latents

SCALE = 4
PAD = 64  # pixels of the output: sides become multiples
TILE, STRIDE = 1024, 800  # pixels of the output


def transcription(
    pipe: Any, lr_CHW: torch.Tensor, steps: int, eta: float, seed: int, color_fix: bool = False
) -> torch.Tensor:
    """One LR picture (3, H, W) in [0, 1] to (3, 4 H, 4 W) in [0, 1]."""
    noise = torch.Generator().manual_seed(seed)
    lr = lr_CHW[None]
    enlarged = interpolate(lr, scale_factor=SCALE, mode="bicubic", align_corners=False).clamp(0, 1)
    height, width = enlarged.shape[2:]
    if height % PAD or width % PAD:  # a whole 64 more on a side that was one already
        enlarged = pad_reflect(enlarged, (height // PAD + 1) * PAD, (width // PAD + 1) * PAD)
    if max(height, width) <= TILE:
        sampled = sample(pipe, lr, enlarged, steps, eta, noise)
        return (adain(sampled, enlarged) if color_fix else sampled)[0, :, :height, :width].clamp(0, 1)
    total, count = torch.zeros_like(enlarged), torch.zeros_like(enlarged)
    for top, left in tiles(*enlarged.shape[2:]):
        place = (..., slice(top, top + TILE), slice(left, left + TILE))
        total[place] += adain(sample(pipe, lr, enlarged[place], steps, eta, noise), enlarged[place])
        count[place] += 1
    return (total / count)[0, :, :height, :width].clamp(0, 1)


def tiles(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Top left corners; the last tile of a row or column ends at the border."""
    tops, lefts = ([*range(0, max(side - TILE, 0), STRIDE), max(side - TILE, 0)] for side in (height, width))
    return ((top, left) for top in tops for left in lefts)


def sample(
    pipe: Any, lr: torch.Tensor, enlarged: torch.Tensor, steps: int, eta: float, noise: torch.Generator
) -> torch.Tensor:
    """An enlarged LR or tile of one (1, 3, H, W) in [0, 1] to the sampled picture."""
    z_lr = encode_latents(pipe.vae, 2 * enlarged - 1)  # the mode: a sample of the posterior costs the same
    draw = lambda: torch.randn(z_lr.shape, generator=noise)
    abars = pipe.scheduler.alphas_cumprod
    times = [1 + step * (1000 // steps) for step in reversed(range(steps))]
    x = draw()
    for number, t in enumerate(times):
        abar = abars[t]
        before = abars[times[number + 1]] if number + 1 < steps else abars[0]
        degradation = pipe.learner(lr)
        output = pipe.adapter(x, t, z_lr, degradation)
        x_0, eps = both(pipe.scheduler.config["prediction_type"], output, x, abar)
        if number == 0:  # noise guidance
            x_0, eps = z_lr, (x - abar.sqrt() * z_lr) / (1 - abar).sqrt()
        sigma = eta * ((1 - before) / (1 - abar) * (1 - abar / before)).sqrt()
        x = before.sqrt() * x_0 + (1 - before - sigma**2).sqrt() * eps + sigma * draw()
    return decode_latents(pipe.vae, x) / 2 + 0.5


def both(prediction: str, output: torch.Tensor, x: torch.Tensor, abar: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Clean latent and noise that the UNet's answer stands for; the paper's UNet answers with the noise."""
    if prediction == "epsilon":
        return (x - (1 - abar).sqrt() * output) / abar.sqrt(), output
    return abar.sqrt() * x - (1 - abar).sqrt() * output, abar.sqrt() * output + (1 - abar).sqrt() * x
