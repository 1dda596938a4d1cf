"""Make `tiny`: pretrain its base, a small autoencoder and a small diffusion UNet, and assemble the model.

    python -m jobs.tiny_base autoencoder --photos DIR --out DIR
    python -m jobs.tiny_base unet        --photos DIR --out DIR
    python -m jobs.tiny_base export      --out DIR --to deedsr/assets/tiny
    python -m jobs.tiny_base photos      --photos DIR --out DIR
    python -m jobs.tiny_base assemble    --out ADAPTER --to deedsr/assets/tiny [--sampling JSON]

The base plays the part that Stable Diffusion plays at full size: it learns what photographs look like and never
sees a low-resolution image. Its cross-attention is made useful by a layout prompt, 16 tokens that say for each cell
of a 4x4 grid its mean colour and the strength of its edges, dropped for 15 % of the samples. The degradation-aware
adapter later puts its own tokens in their place.

Both parts checkpoint every few minutes into --out and continue from there.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from tqdm import tqdm

from deedsr.sampling.settings import SamplingSettings

# Shape suffixes: B batch, C channels, H W space, N tokens, D token width.

VALIDATION = ("Green-Maple", "Sea-of-Lanterns", "Yellow-Flower", "Picture_0B", "picosdeeuropa", "libjxl-flower")
LATENT_CHANNELS = 8
TOKEN_WIDTH = 128
LAYOUT_FEATURES = 8  # mean RGB, grey std, horizontal and vertical edge energy, cell row, cell column
SEED = 2404_00661

AUTOENCODER = {
    "encoder_block_out_channels": (32, 32, 32),
    "decoder_block_out_channels": (32, 32, 32),
    "num_encoder_blocks": (1, 2, 3),
    "num_decoder_blocks": (3, 2, 1),
    "latent_channels": LATENT_CHANNELS,
}
UNET = {
    "sample_size": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (64, 96, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TOKEN_WIDTH,
    "attention_head_dim": (2, 3, 4),
    "use_linear_projection": True,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "v_prediction",
}


def load_photos(folder: Path, longest: int = 2200) -> list[np.ndarray]:
    """RGB uint8 photographs of `folder` without the validation ones, each at two sizes."""
    photos = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".png")):
        if any(name in path.name for name in VALIDATION):
            continue
        image = np.asarray(Image.open(path).convert("RGB"))
        for side in (longest, longest // 2):
            scale = side / max(image.shape[:2])
            if scale < 1:
                photos.append(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    if not photos:
        raise SystemExit(f"no training photograph in {folder}")
    return photos


def random_crop(photos: list[np.ndarray], side: int, rng: np.random.Generator) -> np.ndarray:
    """One textured `side` x `side` crop, randomly flipped, transposed and recoloured."""
    for _ in range(8):
        photo = photos[rng.integers(len(photos))]
        top, left = rng.integers(photo.shape[0] - side), rng.integers(photo.shape[1] - side)
        crop = photo[top : top + side, left : left + side]
        if crop.std() > 15 or rng.random() < 0.1:
            break
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    if rng.random() < 0.25:
        crop = crop.transpose(1, 0, 2)
    return recolour(np.ascontiguousarray(crop), rng)


def recolour(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other colours: two dozen photographs hold too few, an autoencoder trained on them alone fails on bright green."""
    if rng.random() < 0.6:
        crop = np.ascontiguousarray(crop[..., rng.permutation(3)])
    if rng.random() < 0.6:
        levels = np.linspace(0, 1, 256)[:, None]
        curves = np.exp(rng.uniform(-0.4, 0.4, 3)) * levels ** np.exp(rng.uniform(-0.4, 0.4, 3))
        crop = cv2.LUT(crop, (255 * curves).clip(0, 255).round().astype(np.uint8)[None])
    return crop


def write_photos(photos_dir: Path, out: Path) -> None:
    """The training photographs as they are trained on, each at two sizes and also recoloured: sources for shards."""
    for number, photo in enumerate(load_photos(photos_dir)):
        rng = np.random.default_rng([SEED, 11, number])
        for name, image in (("plain", photo), ("recoloured", recolour(photo, rng))):
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            cv2.imwrite(str(out / f"{number:03d}-{name}.jpg"), bgr, [cv2.IMWRITE_JPEG_QUALITY, 96])


def to_tensor(crops: list[np.ndarray]) -> torch.Tensor:
    """(B,3,H,W) in [-1,1]."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x_BCHW[..., :, 1:] - x_BCHW[..., :, :-1], x_BCHW[..., 1:, :] - x_BCHW[..., :-1, :]


def layout_prompt(x_BCHW: torch.Tensor) -> torch.Tensor:
    """(B,16,LAYOUT_FEATURES) description of the 4x4 cells of an image in [-1,1]."""
    grey = x_BCHW.mean(1, keepdim=True)
    pool = lambda t: F.adaptive_avg_pool2d(t, 4).flatten(2)
    dx, dy = edges(grey)
    mean, square = pool(x_BCHW), pool(grey.square())
    std = (square - pool(grey).square()).clamp_min(0).sqrt()
    row, column = torch.meshgrid(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 4), indexing="ij")
    place = torch.stack([row.flatten(), column.flatten()]).expand(x_BCHW.shape[0], 2, 16)
    return torch.cat([mean, std, 5 * pool(dx.abs()), 5 * pool(dy.abs()), place], 1).transpose(1, 2)


class Run:
    """Progress bar, learning rate, EMA and checkpoints of one pretraining part."""

    def __init__(self, out: Path, name: str, modules: dict[str, torch.nn.Module], steps: int, lr: float):
        self.path = out / f"{name}.pt"
        self.modules = torch.nn.ModuleDict(modules)
        self.steps, self.step, self.losses = steps, 0, []
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
        self.lr = lr
        self.ema = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step, self.losses = state["ema"], state["step"], state["losses"]

    def learning_rate(self, warmup: int = 200) -> float:
        """Linear warm-up, then a cosine to 2 %."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        return self.lr * min(1, (self.step + 1) / warmup) * (0.02 + 0.98 * cosine)

    def loop(self, loss_of_step, minutes_between_saves: float = 4):
        saved = time.time()
        bar = tqdm(total=self.steps, initial=self.step, smoothing=0.05, mininterval=10)
        while self.step < self.steps:
            loss = loss_of_step(np.random.default_rng([SEED, self.step]), self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(0.999, (1 + self.step) / (10 + self.step))
            for key, value in self.modules.state_dict().items():
                self.ema[key].lerp_(value.detach(), 1 - decay)
            self.losses.append(float(loss.detach()))
            bar.update()
            bar.set_postfix(loss=f"{np.mean(self.losses[-100:]):.4f}", refresh=False)
            if time.time() - saved > 60 * minutes_between_saves or self.step == self.steps:
                self.save()
                saved = time.time()

    def save(self):
        state = {
            "modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema,
            "step": self.step, "losses": self.losses,
        }  # fmt: skip
        torch.save(state, self.path.with_suffix(".part"))
        os.replace(self.path.with_suffix(".part"), self.path)

    def averaged(self, name: str) -> torch.nn.Module:
        module = self.modules[name]
        prefix = name + "."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in self.ema.items() if k.startswith(prefix)})
        return module.eval().requires_grad_(False)


def autoencoder_run(out: Path, steps: int) -> Run:
    torch.manual_seed(SEED)
    return Run(out, "autoencoder", {"vae": AutoencoderTiny(**AUTOENCODER)}, steps, lr=2e-3)


def train_autoencoder(photos_dir: Path, out: Path, steps: int, side: int = 96, batch: int = 8) -> None:
    photos = load_photos(photos_dir)
    run = autoencoder_run(out, steps)
    vae = run.modules["vae"]

    def loss_of_step(rng, step):
        x = to_tensor([random_crop(photos, side, rng) for _ in range(batch)])
        z = vae.encode(x).latents
        # Latents near zero mean and unit variance are what the diffusion model's noise schedule assumes.
        spread = z.mean((0, 2, 3)).square().mean() + (z.var((0, 2, 3)) - 1).square().mean()
        noise = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32))
        y = vae.decode(z + 0.04 * noise).sample  # the decoder will meet sampled, slightly wrong latents
        detail = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
        return F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x) + 0.5 * detail + 0.01 * spread

    run.loop(loss_of_step)


def train_unet(photos_dir: Path, out: Path, steps: int, bank: int = 2500, crop: int = 192) -> None:
    """Two resolutions: most steps on 16x16 latents, the last third on 32x32 (context at the deepest level)."""
    vae = autoencoder_run(out, 0).averaged("vae")
    photos = load_photos(photos_dir)
    torch.manual_seed(SEED)
    embed = torch.nn.Sequential(
        torch.nn.Linear(LAYOUT_FEATURES, TOKEN_WIDTH), torch.nn.SiLU(), torch.nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH)
    )
    run = Run(out, "unet", {"unet": UNet2DConditionModel(**UNET), "embed": embed}, steps, lr=6e-4)
    unet, embed = run.modules["unet"], run.modules["embed"]
    abar = DDIMScheduler(**SCHEDULER).alphas_cumprod

    some_images, some_latents = [], []
    for start in tqdm(range(0, bank, 32), desc="latent bank", mininterval=10):
        rng = np.random.default_rng([SEED, 7, start])
        crops = [random_crop(photos, crop, rng) for _ in range(32)]
        with torch.no_grad():
            some_latents.append(vae.encode(to_tensor(crops)).latents.half())
        some_images.append(np.stack(crops))
    images, latents = np.concatenate(some_images), torch.cat(some_latents)

    def loss_of_step(rng, step):
        size, batch = (16, 24) if step < steps * 2 // 3 else (32, 8)
        index = rng.integers(len(images), size=batch)
        corners = zip(index, *rng.integers(crop // 4 - size + 1, size=(2, batch)), strict=True)
        cuts = [(i, slice(top, top + size), slice(left, left + size)) for i, top, left in corners]
        z = torch.stack([latents[i, :, rows, columns] for i, rows, columns in cuts]).float()
        pixels = lambda cells: slice(4 * cells.start, 4 * cells.stop)
        x = to_tensor([images[i, pixels(rows), pixels(columns)] for i, rows, columns in cuts])
        keep = torch.from_numpy((rng.random(batch) > 0.15).astype(np.float32))[:, None, None]
        tokens = embed(layout_prompt(x)) * keep
        t = torch.from_numpy(rng.integers(1000, size=batch))
        noise = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32))
        a = abar[t].sqrt().view(-1, 1, 1, 1)
        s = (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
        v = unet(a * z + s * noise, t, tokens).sample
        return F.mse_loss(v, a * noise - s * z)

    run.loop(loss_of_step)


def export(out: Path, to: Path) -> None:
    """Write the averaged weights in half precision, diffusers layout, with the training curves."""
    vae = autoencoder_run(out, 0).averaged("vae")
    unet = UNet2DConditionModel(**UNET)
    state = torch.load(out / "unet.pt", weights_only=True)
    unet.load_state_dict({k.removeprefix("unet."): v for k, v in state["ema"].items() if k.startswith("unet.")})
    vae.half().save_pretrained(to / "vae")
    unet.half().save_pretrained(to / "unet")
    DDIMScheduler(**SCHEDULER).save_pretrained(to / "scheduler")
    curve = lambda losses: [round(float(np.mean(losses[i : i + 100])), 5) for i in range(0, len(losses), 100)]
    ae_losses = torch.load(out / "autoencoder.pt", weights_only=True)["losses"]
    curves = {"seed": SEED, "every": 100, "autoencoder": curve(ae_losses), "unet": curve(state["losses"])}
    (to / "pretraining.json").write_text(json.dumps(curves))


def assemble(adapter: Path, to: Path, sampling: str | None) -> None:
    """Write base, learner and adapter as one pipeline in half precision, without the card and licence of a model that
    stands alone."""
    from deedsr import DeeDSRPipeline

    pipeline = DeeDSRPipeline.from_pretrained(adapter)
    if sampling:
        pipeline.register_to_config(sampling=SamplingSettings.of(json.loads(sampling)).as_dict())
    pipeline.to(torch.float16).save_pretrained(to)
    for name in ("README.md", "LICENSE"):
        (to / name).unlink(missing_ok=True)
    for path in [to / "model_index.json", *to.glob("*/config.json")]:
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # where the parts lay on the machine that made them
        path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["autoencoder", "unet", "photos", "export", "assemble"])
    parser.add_argument("--photos", type=Path, help="folder of training photographs")
    parser.add_argument("--out", type=Path, required=True, help="folder of training state")
    parser.add_argument("--to", type=Path, help="export: folder of the diffusers layout")
    parser.add_argument("--sampling", help="assemble: sampling settings of the model, as JSON")
    parser.add_argument("--steps", type=int, help="default: 5000 for the autoencoder, 12000 for the UNet")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "autoencoder":
        train_autoencoder(args.photos, args.out, args.steps or 5000)
    elif args.part == "unet":
        train_unet(args.photos, args.out, args.steps or 12000)
    elif args.part == "photos":
        write_photos(args.photos, args.out)
    elif args.part == "assemble":
        assemble(args.out, args.to, args.sampling)
    else:
        export(args.out, args.to)


if __name__ == "__main__":
    main()
