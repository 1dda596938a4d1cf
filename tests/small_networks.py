"""A whole model of the real classes, small enough for tests, with random weights; a UNet of `tiny`'s geometry."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import nn

from deedsr.adapter.adapter import DegradationAwareAdapter, freeze
from deedsr.learner.resnet import DegradationLearner
from deedsr.presets import LEARNER_PRESETS
from deedsr.sampling.pipeline import DeeDSRPipeline
from tools.tiny.base import UNET

# Stable Diffusion 2.1-base's noise schedule.
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def make_pipeline(kind: str = "tiny", prediction: str = "v_prediction", scale: int = 4, **sampling) -> DeeDSRPipeline:
    """A pipeline around a KL (factor 2) or Tiny (factor 4) autoencoder and a two-level UNet, weights from seed 0."""
    torch.manual_seed(0)
    vae = {
        "kl": lambda: AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            latent_channels=4,
        ),
        "tiny": lambda: AutoencoderTiny(
            encoder_block_out_channels=(16, 16, 16),
            decoder_block_out_channels=(16, 16, 16),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        ),
    }[kind]()
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    learner = DegradationLearner(**LEARNER_PRESETS["tiny"])
    adapter = DegradationAwareAdapter.for_unet(unet, preset="tiny", degradation_dim=learner.dim)
    for parameter in adapter.parameters():  # what starts at zero has learned something in a trained adapter
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    parts = [part.eval() for part in (vae, unet, learner, adapter)]
    pipe = DeeDSRPipeline(
        *parts[:2], DDIMScheduler(**SCHEDULE, prediction_type=prediction), *parts[2:], scale=scale, sampling=sampling
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SIDES = (16, 12)  # of the latents: not square


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return freeze(UNet2DConditionModel(**UNET))


def inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Noisy latents, diffusion time, LR latent, degradation vector."""
    draw = torch.Generator().manual_seed(2)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    times = torch.tensor([3, 700, 41, 980])[:batch]
    return normal(batch, 8, *SIDES), times, normal(batch, 8, *SIDES), normal(batch, 12).abs()


def wake(adapter: DegradationAwareAdapter) -> None:
    """Give every zero-initialised layer some weight, as training does."""
    torch.manual_seed(3)
    for parameter in adapter.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
