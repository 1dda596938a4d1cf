"""Last stage of `tiny`: adapter and decoder are trained on the picture that one step of sampling makes.

Sampling takes the LR latent at a low timestep, without noise (temperature 0), asks the UNet once and decodes. All of it
is differentiable, so that the loss is that of the picture. Two timesteps serve two purposes: at REALISM the targets are
the HR and the teacher's picture, by absolute error, by features of EfficientNet-Lite1 and, if asked, by a projected
discriminator; at FIDELITY nearly nothing but the absolute error to the HR. The UNet and the encoder stay as they are.

Shape suffixes: B batch, C channels, H W pixels, h w latent pixels, D degradation vector.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from deedsr import DeeDSRPipeline
from deedsr.adapter.condition_encoder import Condition
from deedsr.adapter.objective import clean_latent
from deedsr.sampling.autoencoder import decode_latents, encode_latents
from deedsr.sampling.images import enlarge
from tools.tiny.bank import SIDE, read_bank
from tools.tiny.base import FACTOR, edge_error
from tools.tiny.features import Perceptual, ProjectedDiscriminator, augment, hinge, realness
from tools.tiny.photographs import to_signed
from tools.tiny.training import Budget, Run

REALISM, FIDELITY = 49, 19  # timesteps: the last one of 20 and of 50 steps with trailing spacing
CROP = 128  # pixels
SAMPLES = {"realism": 7, "fidelity": 2, "autoencoder": 1}  # of a batch
EDGES = 0.5


@dataclass(frozen=True)
class Weights:
    """Of the terms of the loss at REALISM; `pixels` at FIDELITY, too."""

    teacher: float = 0.8  # of the targets' weights, 0 = the HR alone
    pixels: float = 4.0
    perceptual: float = 2.0
    adversarial: float = 0.0  # length of its gradient at the picture, 1 = that of all other terms together
    adversarial_from: int = 2000  # step

    def adversarial_at(self, step: int) -> bool:
        return self.adversarial > 0 and step >= self.adversarial_from


def one_step(
    pipeline: DeeDSRPipeline,
    z_lr: torch.Tensor,
    t: torch.Tensor,
    vector: torch.Tensor,
    condition: Condition | None = None,
) -> torch.Tensor:
    """The latent (B, C, h, w) that sampling ends with when its last step alone is not guided, at timesteps t (B,).

    `condition` replaces what the adapter makes of the LR latent and the vector (B, D).
    """
    abar = pipeline.scheduler.alphas_cumprod.to(z_lr.device)[t].view(-1, 1, 1, 1)
    last = pipeline.scheduler.final_alpha_cumprod
    x_t = abar.sqrt() * z_lr
    v = pipeline.adapter(x_t, t, z_lr, vector, condition).float()
    x_0 = clean_latent(v, x_t, abar, "v_prediction")
    eps = abar.sqrt() * v + (1 - abar).sqrt() * x_t
    return last.sqrt() * x_0 + (1 - last).sqrt() * eps


def train(work: Path, model: str, steps: int, weights: Weights, budget: Budget) -> None:
    pipeline = DeeDSRPipeline.from_pretrained(model, torch_dtype=torch.float32).to(budget.device)
    vae, adapter = pipeline.vae.requires_grad_(False), pipeline.adapter.requires_grad_(True).train()
    pipeline.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    pipeline.learner.requires_grad_(False)
    vae.encoder.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    discriminator, perceptual = ProjectedDiscriminator(), Perceptual().to(budget.device)
    adapter.detach()  # an attached UNet would be copied with it
    made = torch.nn.ModuleDict({"adapter": adapter, "decoder": vae.decoder.requires_grad_(True)})
    parts = {"model": made, "discriminator": discriminator}
    run = Run(
        work / "pictures.pt", parts, budget, steps=steps, lr=5e-4, averaged=("model",), betas=(0.8, 0.99), decay=0.998,
        warmup=50,
    )  # fmt: skip
    adapter.attach(pipeline.unet)
    bank = read_bank(work, budget.device)
    for step, rng in run:
        x, target, lr, vector = cut(bank, rng, sum(SAMPLES.values()) * budget.batch_factor, CROP)
        count = {name: number * budget.batch_factor for name, number in SAMPLES.items()}
        first, second = count["realism"], count["realism"] + count["fidelity"]
        t = torch.tensor([REALISM] * first + [FIDELITY] * (second - first), device=budget.device)
        with budget.autocast():
            with torch.no_grad():
                z_lr, z_hr = lr_latents(vae, lr[:second]), encode_latents(vae, x[second:]).float()
            z_sr = one_step(pipeline, z_lr, t, vector[:second])
            z = torch.cat([z_sr, z_hr])
            y = decode_latents(vae, z + 0.02 * torch.randn_like(z)).float()
        picture = y.detach().requires_grad_(True)  # gradients of the terms meet here and go on together
        with budget.autocast():
            to_hr, to_teacher = perceptual(picture[:second], x[:second], target[:second])
        own, theirs = pixels(picture[:first], x[:first]), pixels(picture[:first], target[:first])
        percept = torch.lerp(to_hr[:first].mean(), to_teacher[:first].mean(), weights.teacher)
        realism = weights.pixels * torch.lerp(own, theirs, weights.teacher) + weights.perceptual * percept
        fidelity = weights.pixels * pixels(picture[first:second], x[first:second]) + 0.1 * to_hr[first:].mean()
        rebuilt = weights.pixels * pixels(picture[second:], x[second:])
        loss = (first * realism + (second - first) * fidelity + (len(y) - second) * rebuilt) / len(y)
        gradient = torch.autograd.grad(loss, picture)[0]
        adversarial = torch.zeros((), device=budget.device)
        if weights.adversarial_at(step):
            discriminator.requires_grad_(False)
            with budget.autocast():
                adversarial = -realness(discriminator(augment(picture[:first], rng)))
            towards_real = torch.autograd.grad(adversarial, picture)[0]
            gradient += weights.adversarial * gradient[:first].norm() / towards_real.norm() * towards_real
        run.update("model", (y * gradient).sum())
        verdict = torch.zeros((), device=budget.device)
        if weights.adversarial_at(step + 100):  # the discriminator learns a little before it counts
            trainable(discriminator)
            with budget.autocast():
                both = [discriminator(augment(part, rng)) for part in (x[:first], y[:first].detach())]
            verdict = hinge(*both)
            run.update("discriminator", verdict)
        run.log(own=own, theirs=theirs, percept=to_hr[:first].mean(), adversarial=adversarial,
                verdict=verdict, fidelity=fidelity, rebuilt=rebuilt)  # fmt: skip


def lr_latents(vae: AutoencoderTiny, lr_BCHW: torch.Tensor) -> torch.Tensor:
    """Of LRs in [0, 1], enlarged as sampling enlarges them."""
    return encode_latents(vae, 2 * enlarge(lr_BCHW, FACTOR) - 1).float()


def pixels(y_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(y_BCHW, x_BCHW) + EDGES * edge_error(y_BCHW, x_BCHW)


def trainable(discriminator: ProjectedDiscriminator) -> None:
    discriminator.heads.requires_grad_(True)


def cut(bank: dict[str, torch.Tensor], rng: np.random.Generator, count: int, crop: int) -> tuple[torch.Tensor, ...]:
    """HR and teacher (B, 3, crop, crop) in [-1, 1], LR (B, 3, h, w) in [0, 1] and vectors (B, D) of `count` pairs.

    Each pair is mirrored at random along both axes, which changes its vector by .05 of its length;
    a quarter turn, by which it changes by .40, is left out.
    """
    cells = crop // FACTOR
    which = rng.integers(len(bank["hr"]), size=count)
    corners = rng.integers((SIDE - crop) // FACTOR + 1, size=(count, 2))
    mirrored = [[axis for axis in (1, 2) if rng.random() < 0.5] for _ in range(count)]
    device = bank["hr"].device

    def of(name: str, scale: int) -> torch.Tensor:
        side = scale * cells
        found = []
        for number, (top, left), axes in zip(which, corners, mirrored, strict=True):
            part = bank[name][number, :, scale * top : scale * top + side, scale * left : scale * left + side]
            found.append(part.flip(axes))
        return torch.stack(found)

    pictures = [to_signed(of(name, FACTOR)).contiguous(memory_format=torch.channels_last) for name in ("hr", "teacher")]
    return *pictures, of("lr", 1).float() / 255, bank["degradation"][torch.from_numpy(which).to(device)]
