"""The method's numbers at Stable Diffusion 2.1-base's size, to the last digit, without memory for any weight."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from small_networks import SCHEDULE
from torch import nn

from benchmarks.full_size import UNET, VAE
from deedsr.adapter import DegradationAwareAdapter
from deedsr.adapter.adapter import cross_attentions
from deedsr.adapter.da_block import DegradationAwareGroup
from deedsr.adapter.objective import model_output


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        return unet, DegradationAwareAdapter.for_unet(unet, "paper")


def test_the_base_has_stable_diffusions_parameters(full_size):
    with torch.device("meta"):
        assert count(AutoencoderKL(**VAE)) == 83_653_863
    unet, adapter = full_size
    assert count(unet) == 865_910_724
    keys_values = lambda attentions: sum(count(layer) for a in attentions for layer in (a.to_k, a.to_v))
    theirs, ours = keys_values(a for _, a in cross_attentions(unet)), keys_values(adapter.attentions)
    assert (theirs, ours) == (25_559_040, 12_779_520)
    assert count(unet) - theirs + ours + count(adapter.modulations) == 906_111_044


def test_the_encoders_blocks_have_the_papers_parameters(full_size):
    encoder = full_size[1].condition_encoder
    blocks = [
        count(level.resnet) + count(level.aware) + count(level.attention or nn.Identity()) for level in encoder.levels
    ]
    assert [round(n / 1e6, 3) for n in blocks] == [5.190, 5.190, 18.654, 18.651]
    downs = [count(level.down) for level in encoder.levels if level.down is not None]
    assert [round(n / 1e6, 3) for n in downs] == [1.444, 1.444, 5.246]
    middle = count(encoder.mid1) + count(encoder.mid_attention) + count(encoder.mid2)
    assert round(middle / 1e6, 3) == 11.545
    assert [round(count(feature) / 1e6, 2) for feature in encoder.features] == [1.44, 1.44, 2.17, 2.17]
    groups = [round(count(m) / 1e6, 3) for m in encoder.modules() if isinstance(m, DegradationAwareGroup)]
    assert groups == [3.483, 3.483, 13.405, 13.405]


def test_22_residual_blocks_are_modulated_and_16_cross_attentions_replaced(full_size):
    where = lambda names: [sum(name.startswith(part) for name in names) for part in ("down", "mid", "up")]
    unet, adapter = full_size
    assert where([name for name, *_ in adapter.config["residual_blocks"]]) == [8, 2, 12]
    assert where([name for name, *_ in adapter.config["cross_attentions"]]) == [6, 1, 9]
    assert (len(adapter.modulations), len(adapter.attentions)) == (22, 16)
    assert sum(is_block(module) for module in unet.modules()) == 22
    assert {heads for _, _, heads in adapter.config["cross_attentions"]} == {5, 10, 20}


def is_block(module: nn.Module) -> bool:
    return type(module).__name__ == "ResnetBlock2D"


@pytest.mark.parametrize(("height", "width", "tokens"), [(512, 512, 64), (1024, 1024, 256), (512, 768, 96)])
def test_a_token_for_every_64_pixels(full_size, height, width, tokens):
    z_lr = torch.empty(1, 4, height // 8, width // 8, device="meta")
    told = full_size[1].condition_encoder(z_lr, torch.empty(1, device="meta"), torch.empty(1, 1024, device="meta"))
    assert told.tokens.shape == (1, tokens, 512)


def test_the_schedule_is_stable_diffusions():
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    # In fp32; in fp64 the first is 0.0057755001.
    assert scheduler.alphas_cumprod[[981, 961]].tolist() == pytest.approx([0.005776, 0.007282], abs=1e-6)
    assert float(scheduler.alphas_cumprod[999].sqrt()) == pytest.approx(0.06826, abs=5e-6)
    assert float(scheduler.final_alpha_cumprod) == float(scheduler.alphas_cumprod[0])


@pytest.mark.parametrize(
    ("eta", "of_latent", "of_start", "of_noise"), [(1.0, 0.0178, 0.889, 0.454), (0.0, 0.0094, 0.999, 0.0)]
)
def test_the_guided_first_step_has_the_papers_constants(eta, of_latent, of_start, of_noise):
    """x_961 as a combination of LR latent, x_T and fresh noise."""
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(50)

    def stepped(latent: float, start: float, noise: float) -> float:
        z, x_t, n = (torch.full((1, 1, 1, 1), value) for value in (latent, start, noise))
        output = model_output(z, x_t, scheduler.alphas_cumprod[981], "epsilon")
        return float(scheduler.step(output, 981, x_t, eta=eta, variance_noise=n).prev_sample)

    shares = stepped(1, 0, 0), stepped(0, 1, 0), stepped(0, 0, 1)
    assert shares[0] == pytest.approx(of_latent, abs=5e-5)
    assert shares[1:] == pytest.approx((of_start, of_noise), abs=1e-3)
