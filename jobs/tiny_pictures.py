"""Teach adapter and decoder of the model `tiny` what pictures should look like. docs/tiny.md tells how it went.

    python -m jobs.tiny_pictures train  --model MODEL --data SHARDS LATENTS [SHARDS LATENTS ...] --out work
    python -m jobs.tiny_pictures export --model MODEL --out work --to FOLDER

`deedsr train adapter` asks for latents of the least squared error, whose pictures are soft. Here MODEL goes on from
there: its guided sampling is followed for some or all of its UNet calls, the last one with gradients, and what the
decoder makes of the clean latent is judged as a picture. Two questions take turns. Where the UNet takes over at the
recommended step: absolute error of colours and edges, distance of EfficientNet-Lite1's features (never the network
that measures, benchmarks/tiny_figures.py has Lite0), and a small patch discriminator; the decoder learns, too, and goes
on decoding the encoder's own latents. Where it takes over at FIDELITY: squared error of the pixels, for those who want
what is there. Base and encoder are untouched. Training continues where it was stopped.
"""

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from tqdm import tqdm

from deedsr import DeeDSRPipeline
from deedsr.sampling.guidance import clean_latent, guidance_strengths
from deedsr.sampling.latents import decode_latents, encode_latents
from jobs.tiny_base import edges, to_tensor, write_model
from jobs.tiny_decoder import Perceptual, discriminator
from pipelines.dataset import Dataset

# Shape suffixes: B batch, C channels, H W pixels, h w latent cells.

FIDELITY, FIDELITY_TURN = 0.9, 0.35  # share of guided steps; how often it is asked for
ENDS = (0.4, 0.3, 0.2, 0.1)  # how often the gradients are those of the first UNet call, of the second, ...
CELL = 4  # pixels
SEED = 4


class Bank(NamedTuple):
    """All of some datasets: crops (N, H, W, 3) uint8, latents of their LRs (N, C, h, w) half, vectors (N, D)."""

    hr: np.ndarray
    z_lr: torch.Tensor
    vector: torch.Tensor

    @classmethod
    def read(cls, places: list[str]) -> "Bank":
        """`places`: by turns shards and the latents that were made of them."""
        hr, z_lr, vectors = [], [], []
        for pixels, latents in zip(places[::2], places[1::2], strict=True):
            shards, encoded = Dataset.open(pixels), Dataset.open(latents)
            if encoded.order_digest != shards.digest:
                raise SystemExit(f"{latents} was not made of {pixels}")
            table, index = shards.index(), encoded.index()
            for row in tqdm(range(len(table)), desc=pixels, mininterval=10):
                _, stored, _ = encoded.read_latents(index, row)
                hr.append(shards.read(table, row).hr)
                z_lr.append(torch.from_numpy(stored.lr_mean))
                vectors.append(torch.from_numpy(stored.degradation))
        return cls(np.stack(hr), torch.stack(z_lr), torch.stack(vectors))

    def batch(self, rng: np.random.Generator, size: int, crop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """HR crops (B,3,H,W) in [-1,1], LR latents of the same places (B,C,h,w), vectors (B,D)."""
        which = rng.integers(len(self.hr), size=size)
        cells = crop // CELL
        corners = rng.integers(self.z_lr.shape[2] - cells + 1, size=(size, 2))
        places = list(zip(which, *corners.T, strict=True))
        hr = to_tensor([self.hr[i, CELL * t : CELL * t + crop, CELL * l : CELL * l + crop] for i, t, l in places])
        z_lr = torch.stack([self.z_lr[i, :, t : t + cells, l : l + cells] for i, t, l in places]).float()
        return hr, z_lr, self.vector[which].float()


class Sampler:
    """Deterministic guided sampling (eta 0) as the model recommends it, from the LR's latent on."""

    def __init__(self, pipeline: Any):
        self.adapter, settings = pipeline.adapter, pipeline.sampling
        self.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.scheduler.set_timesteps(settings.num_inference_steps)
        self.abar = self.scheduler.alphas_cumprod
        self.share = settings.noise_guidance_share

    def times(self, share: float) -> list[int]:
        """Timesteps at which the UNet is asked, after `share` of the steps were guided."""
        times = self.scheduler.timesteps.tolist()
        strengths = guidance_strengths(1.0, share, len(times))
        return [t for t, strength in zip(times, strengths, strict=True) if strength == 0]

    def latent(self, z_lr: torch.Tensor, vector: torch.Tensor, noise: torch.Tensor, times: list[int]) -> torch.Tensor:
        """What is decoded if the call at the last of `times` was the last one; gradients are those of this call."""
        abar = self.abar[int(self.scheduler.timesteps[0])]
        x_0, eps = z_lr, (noise - abar.sqrt() * z_lr) / (1 - abar).sqrt()  # x_T was all noise
        for t in times:
            abar = self.abar[t]
            x = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
            with torch.set_grad_enabled(t == times[-1]):
                output = self.adapter(x, torch.full((len(x),), t), z_lr, vector)
            x_0 = clean_latent(output, x, abar, self.scheduler.config["prediction_type"])
            eps = (x - abar.sqrt() * x_0) / (1 - abar).sqrt()
        abar = self.scheduler.final_alpha_cumprod  # what is decoded holds a little noise
        return abar.sqrt() * x_0 + (1 - abar).sqrt() * eps


class Training:
    """Networks, averages, optimizers and curve of one run, kept in `out`."""

    def __init__(self, args: argparse.Namespace):
        self.path, self.step = args.out / "pictures.pt", 0
        self.curve: list[list[float]] = []
        self.pipeline = DeeDSRPipeline.from_pretrained(args.model)
        self.vae, self.adapter = self.pipeline.vae.float().requires_grad_(False), self.pipeline.adapter.float()
        self.pipeline.unet.float().requires_grad_(False)
        self.adapter.requires_grad_(True)
        self.vae.decoder.requires_grad_(True)
        torch.manual_seed(SEED)
        self.judge = discriminator()
        learning = ((self.adapter, args.lr), (self.vae.decoder, args.lr / 2), (self.judge, args.judge_lr))
        self.rates = [rate for _, rate in learning]
        self.optimizers = [
            torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.8, 0.99), weight_decay=0)
            for module, rate in learning
        ]
        self.averaged = [copy.deepcopy(dict(module.named_parameters())) for module in (self.adapter, self.vae.decoder)]
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.adapter.load_state_dict(state["adapter"])
            self.vae.decoder.load_state_dict(state["decoder"])
            self.judge.load_state_dict(state["judge"])
            for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            self.averaged, self.step, self.curve = state["averaged"], state["step"], state["curve"]

    def save(self) -> None:
        state = {
            "adapter": self.adapter.state_dict(),
            "decoder": self.vae.decoder.state_dict(),
            "judge": self.judge.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averaged": self.averaged,
            "step": self.step,
            "curve": self.curve,
        }
        torch.save(state, self.path.with_suffix(".part"))
        os.replace(self.path.with_suffix(".part"), self.path)

    def set_rates(self, steps: int, warmup: int = 100) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1, self.step / steps)))
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1, (self.step + 1) / warmup) * (0.02 + 0.98 * cosine)

    @torch.no_grad()
    def average(self, decay: float = 0.998) -> None:
        decay = min(decay, (1 + self.step) / (10 + self.step))
        for averages, module in zip(self.averaged, (self.adapter, self.vae.decoder), strict=True):
            for name, value in module.named_parameters():
                averages[name].lerp_(value, 1 - decay)


def train(args: argparse.Namespace) -> None:
    run = Training(args)
    bank = Bank.read(args.data)
    sampler, perceptual = Sampler(run.pipeline), Perceptual()
    adapter_step, decoder_step, judge_step = run.optimizers
    names = ("fidelity", "pixels", "perceptual", "adversarial", "judge")
    sums: dict[str, list[float]] = {name: [] for name in names}
    saved = time.time()
    bar = tqdm(total=args.steps, initial=run.step, smoothing=0.05, mininterval=10)
    while run.step < args.steps:
        rng = np.random.default_rng([SEED, run.step])
        x, z_lr, vector = bank.batch(rng, args.batch, args.crop)
        noise = torch.from_numpy(rng.standard_normal(z_lr.shape, dtype=np.float32))
        faithful = rng.random() < FIDELITY_TURN
        times = sampler.times(FIDELITY if faithful else sampler.share)
        ends = np.array(ENDS[: len(times)])
        end = rng.choice(len(ends), p=ends / ends.sum())
        run.set_rates(args.steps)
        for optimizer in (adapter_step, decoder_step):
            optimizer.zero_grad(set_to_none=True)
        z = sampler.latent(z_lr, vector, noise, times[: end + 1])
        if faithful:
            error = F.mse_loss(decode_latents(run.vae, z), x)
            (args.fidelity_weight * error).backward()
            sums["fidelity"].append(float(error.detach()))
            decoder_step.zero_grad(set_to_none=True)  # sharp pictures are what it is for
        else:
            own = x[: max(1, args.batch // 4)]
            encoded = encode_latents(run.vae, own)
            encoded = encoded + 0.02 * torch.from_numpy(rng.standard_normal(encoded.shape, dtype=np.float32))
            wanted = torch.cat([x, own])
            y = decode_latents(run.vae, torch.cat([z, encoded]))
            detail = sum((a - b).abs().mean() for a, b in zip(edges(wanted), edges(y), strict=True))
            pixels, percept = F.l1_loss(y, wanted) + 0.5 * detail, perceptual(y, wanted)
            loss = args.pixel_weight * pixels + args.perceptual_weight * percept
            if run.step >= args.adversarial_from:
                run.judge.requires_grad_(False)
                adversarial = -run.judge(y).mean()
                loss = loss + args.adversarial_weight * adversarial
                run.judge.requires_grad_(True)
                sums["adversarial"].append(float(adversarial.detach()))
            loss.backward()
            sums["pixels"].append(float(pixels.detach()))
            sums["perceptual"].append(float(percept.detach()))
            torch.nn.utils.clip_grad_norm_(run.vae.decoder.parameters(), 1.0)
            decoder_step.step()
            if run.step >= args.adversarial_from - 200:  # the judge learns a little before it is listened to
                verdict = F.relu(1 - run.judge(wanted)).mean() + F.relu(1 + run.judge(y.detach())).mean()
                judge_step.zero_grad(set_to_none=True)
                verdict.backward()
                judge_step.step()
                sums["judge"].append(float(verdict.detach()))
        torch.nn.utils.clip_grad_norm_(run.adapter.parameters(), 1.0)
        adapter_step.step()
        run.step += 1
        run.average()
        bar.update()
        if run.step % 100 == 0:
            run.curve.append([round(float(np.mean(sums[name])), 5) if sums[name] else 0.0 for name in names])
            bar.set_postfix_str(str(dict(zip(names, run.curve[-1], strict=True))))
            sums = {name: [] for name in names}
        if time.time() - saved > 120 or run.step == args.steps:
            run.save()
            saved = time.time()


def export(args: argparse.Namespace) -> None:
    """Write the whole model with the averaged weights, in half precision; its curve joins those of its parts."""
    run = Training(args)
    with torch.no_grad():
        for averages, module in zip(run.averaged, (run.adapter, run.vae.decoder), strict=True):
            for name, value in module.named_parameters():
                value.copy_(averages[name])
    write_model(run.pipeline, args.to)
    path = args.to / "pretraining.json"
    curves = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(curves | {"pictures": run.curve}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "export"])
    parser.add_argument("--model", required=True, help="model folder to go on from")
    parser.add_argument("--data", nargs="+", help="train: shards and their latents, by turns")
    parser.add_argument("--out", type=Path, required=True, help="folder of training state")
    parser.add_argument("--to", type=Path, help="export: folder of the model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=128, help="pixels of the HR")
    parser.add_argument("--lr", type=float, default=3e-4, help="of the adapter; half of it for the decoder")
    parser.add_argument("--judge-lr", type=float, default=5e-4)
    parser.add_argument("--pixel-weight", type=float, default=1.0)
    parser.add_argument("--perceptual-weight", type=float, default=2.0)
    parser.add_argument("--adversarial-weight", type=float, default=0.1)
    parser.add_argument("--fidelity-weight", type=float, default=10.0)
    parser.add_argument("--adversarial-from", type=int, default=400, help="step")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "train":
        train(args)
    else:
        export(args)


if __name__ == "__main__":
    main()
