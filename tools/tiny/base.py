"""The base of `tiny`: a small autoencoder and a small diffusion UNet, in the part that Stable Diffusion plays.

The base learns what photographs look like and never sees a low-resolution image. Its cross-attention is made useful by
a layout prompt, 16 tokens that say for each cell of a 4x4 grid its mean colour and the strength of its edges, dropped
for 15 % of the samples. The degradation-aware adapter later puts its own tokens in their place.

Shape suffixes: B batch, C channels, H W pixels, h w latent pixels, N tokens, D token width.
"""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock

from deedsr import DeeDSRPipeline, DegradationAwareAdapter
from deedsr.errors import UsageError
from deedsr.hub.model_folder import find_folder, load_part
from tools.tiny.assembly import CURVES, curves, write_model
from tools.tiny.photographs import Photographs, to_signed
from tools.tiny.training import SEED, Budget, Run, averaged_weights

TOKEN_WIDTH = 128
LAYOUT_FEATURES = 8  # mean RGB, grey std, horizontal and vertical edge energy, row and column of the grid
FACTOR = 4  # pixels per latent pixel and side
PROMPT_SHARE = 0.85


def autoencoder_config(latent_channels: int) -> dict[str, Any]:
    return {
        "encoder_block_out_channels": (32, 32, 32),
        "decoder_block_out_channels": (32, 32, 32),
        "num_encoder_blocks": (1, 2, 3),
        "num_decoder_blocks": (3, 2, 1),
        "latent_channels": latent_channels,
    }


def unet_config(latent_channels: int, widths: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "sample_size": 32,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": widths,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "cross_attention_dim": TOKEN_WIDTH,
        "attention_head_dim": tuple(width // 32 for width in widths),
        "use_linear_projection": True,
    }


# What ships, and what comes next: its autoencoder keeps more of a photograph, its UNet has 2.2 times the weights.
BASES = {
    "shipped": (autoencoder_config(8), unet_config(8, (64, 96, 128))),
    "next": (autoencoder_config(16), unet_config(16, (96, 160, 192))),
}
AUTOENCODER, UNET = BASES["shipped"]
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


def edges(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x_BCHW[..., :, 1:] - x_BCHW[..., :, :-1], x_BCHW[..., 1:, :] - x_BCHW[..., :-1, :]


def edge_error(y_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of horizontal and of vertical differences."""
    horizontal, vertical = ((a - b).abs().mean() for a, b in zip(edges(y_BCHW), edges(x_BCHW), strict=True))
    return horizontal + vertical


def layout_prompt(x_BCHW: torch.Tensor) -> torch.Tensor:
    """(B, 16, LAYOUT_FEATURES): description of the 4x4 grid of an image in [-1, 1]."""
    grey = x_BCHW.mean(1, keepdim=True)
    pool = lambda t: F.adaptive_avg_pool2d(t, 4).flatten(2)
    dx, dy = edges(grey)
    mean, square = pool(x_BCHW), pool(grey.square())
    std = (square - pool(grey).square()).clamp_min(0).sqrt()
    line = torch.linspace(-1, 1, 4, device=x_BCHW.device)
    row, column = torch.meshgrid(line, line, indexing="ij")
    place = torch.stack([row.flatten(), column.flatten()]).expand(x_BCHW.shape[0], 2, 16)
    return torch.cat([mean, std, 5 * pool(dx.abs()), 5 * pool(dy.abs()), place], 1).transpose(1, 2)


def train_autoencoder(photos: Path, work: Path, base: str, steps: int, budget: Budget) -> None:
    torch.manual_seed(SEED)
    vae = AutoencoderTiny(**BASES[base][0])
    batch = 8 * budget.batch_factor
    run = Run(work / "autoencoder.pt", {"vae": vae}, budget, steps=steps, lr=2e-3, averaged=("vae",))
    encoder, decoder = (torch.compile(m) if budget.compiled else m for m in (vae.encoder, vae.decoder))
    photographs = Photographs(photos, budget.device)
    for _, rng in run:
        x = to_signed(photographs.crops(batch, 96, rng)).contiguous(memory_format=torch.channels_last)
        with budget.autocast():
            z = encoder(x)
            # The decoder will meet sampled, slightly wrong latents.
            y = decoder(z + 0.04 * torch.randn_like(z)).float()
        # Latents near zero mean and unit variance are what the diffusion model's noise schedule assumes.
        z = z.float()
        spread = z.mean((0, 2, 3)).square().mean() + (z.var((0, 2, 3)) - 1).square().mean()
        loss = F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x) + 0.5 * edge_error(y, x) + 0.01 * spread
        run.update("vae", loss)
        run.log(loss=loss, squared=F.mse_loss(y, x), spread=spread)


def trained_autoencoder(work: Path, base: str) -> AutoencoderTiny:
    vae = AutoencoderTiny(**BASES[base][0])
    vae.load_state_dict(averaged_weights(work / "autoencoder.pt", "vae"))
    return vae.eval().requires_grad_(False)


def train_unet(photos: Path, work: Path, base: str, steps: int, budget: Budget) -> None:
    """Two resolutions: 16x16 latents, and in the last third 32x32 (context at the deepest level)."""
    vae = trained_autoencoder(work, base).to(budget.device)
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(**BASES[base][1])
    embed = torch.nn.Sequential(
        torch.nn.Linear(LAYOUT_FEATURES, TOKEN_WIDTH), torch.nn.SiLU(), torch.nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH)
    )
    parts = torch.nn.ModuleDict({"unet": unet, "embed": embed})
    run = Run(work / "unet.pt", {"parts": parts}, budget, steps=steps, lr=6e-4, averaged=("parts",), decay=0.9995)
    predict = torch.compile(unet) if budget.compiled else unet
    abar = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(budget.device)
    photographs = Photographs(photos, budget.device)
    for step, rng in run:
        size, batch = (16, 24) if step < steps * 2 // 3 else (32, 8)
        batch *= budget.batch_factor
        x = to_signed(photographs.crops(batch, FACTOR * size, rng)).contiguous(memory_format=torch.channels_last)
        t = torch.from_numpy(rng.integers(1000, size=batch)).to(budget.device)
        keep = torch.from_numpy((rng.random(batch) < PROMPT_SHARE).astype("f4")).to(budget.device)[:, None, None]
        with budget.autocast():
            z = vae.encode(x).latents.float()
            noise = torch.randn_like(z)
            signal, sigma = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
            v = predict(signal * z + sigma * noise, t, embed(layout_prompt(x)) * keep).sample
        loss = F.mse_loss(v.float(), signal * noise - sigma * z)
        run.update("parts", loss)
        run.log(loss=loss)


def export(work: Path, base: str, to: Path) -> None:
    """Write the averaged weights with the learner of `tiny` and a new adapter, a model to be trained on pictures.

    A model's folder can stand for its base, too. The training curves lie beside.
    """
    unet = UNet2DConditionModel(**BASES[base][1])
    state = averaged_weights(work / "unet.pt", "parts")
    unet.load_state_dict({k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")})
    learner = load_part(find_folder("tiny"), "learner")
    torch.manual_seed(SEED)
    adapter = DegradationAwareAdapter.for_unet(unet, "tiny", learner.dim, prediction_type=SCHEDULER["prediction_type"])
    adapter.initialize_from(unet)
    parts = (trained_autoencoder(work, base), unet, DDIMScheduler(**SCHEDULER), learner, adapter)
    write_model(DeeDSRPipeline(*parts, lineage={"base": "tiny", "license": "apache-2.0"}), to)
    of_base = {
        name: torch.load(work / f"{name}.pt", weights_only=True, map_location="cpu")["curve"]
        for name in ("autoencoder", "unet")
    }
    (to / CURVES).write_text(json.dumps({"seed": SEED} | of_base))


def deepen(model: str, blocks: Sequence[int], to: Path) -> None:
    """Write `model` with a decoder of more residual blocks per level, the coarsest first, that computes the same.

    Added blocks start as the identity, behind those that are there.
    """
    if to.exists():
        raise UsageError(f"{to} exists: move it away, it would be replaced by a model with a deeper decoder")
    pipeline = DeeDSRPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.register_modules(vae=deepened(pipeline.vae, blocks))
    write_model(pipeline, to)
    (to / CURVES).write_text(json.dumps(curves(model)))


def deepened(vae: AutoencoderTiny, blocks: Sequence[int]) -> AutoencoderTiny:
    if not isinstance(vae, AutoencoderTiny):
        raise SystemExit(f"only the decoder of an AutoencoderTiny can be made deeper, this is {type(vae).__name__}")
    has = vae.config["num_decoder_blocks"]
    if len(has) != len(blocks) or any(few > many for few, many in zip(has, blocks, strict=True)):
        raise SystemExit(f"the decoder has {list(has)} residual blocks per level: ask for as many or more")
    torch.manual_seed(SEED)
    known = {name: value for name, value in vae.config.items() if name != "block_out_channels"}  # none of its arguments
    deeper = AutoencoderTiny.from_config(known, num_decoder_blocks=tuple(blocks))
    deeper.encoder.load_state_dict(vae.encoder.state_dict())
    is_block = lambda layer: isinstance(layer, AutoencoderTinyBlock)
    for (_, old), (_, new) in zip(
        groupby(vae.decoder.layers, is_block), groupby(deeper.decoder.layers, is_block), strict=True
    ):
        there = list(old)
        for number, layer in enumerate(new):
            if number < len(there):
                layer.load_state_dict(there[number].state_dict())
            else:  # what enters is not negative, and the ReLU at the block's end leaves it as it is
                torch.nn.init.zeros_(layer.conv[-1].weight)
                torch.nn.init.zeros_(layer.conv[-1].bias)
    return deeper
