"""The training objective of stage 2, as plain functions of tensors."""

import pytest
import torch
from diffusers import DDIMScheduler
from small_networks import SCHEDULE

from deedsr.adapter.objective import (
    clean_latent,
    denoising_loss,
    model_output,
    noisy_and_target,
    pull_to_lr,
    snr_weight,
)

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
TIMESTEPS = torch.tensor([0, 1, 300, 999])
SCHEDULER = DDIMScheduler(**SCHEDULE)
ABAR = SCHEDULER.alphas_cumprod[TIMESTEPS]


def latents() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, 8, 8, generator=draw) for _ in range(3)]


def column(x_B: torch.Tensor) -> torch.Tensor:
    return x_B.view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_without_guidance_input_and_target_are_those_of_diffusers(prediction):
    z_hr, z_lr, noise = latents()
    noisy, target = noisy_and_target(z_hr, z_lr, noise, ABAR, torch.zeros(4), prediction)
    assert torch.equal(noisy, SCHEDULER.add_noise(z_hr, noise, TIMESTEPS))
    expected = {"epsilon": noise, "v_prediction": SCHEDULER.get_velocity(z_hr, noise, TIMESTEPS), "sample": z_hr}
    assert torch.equal(target, expected[prediction])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_of_a_pulled_latent_leads_to_the_hr_latent(prediction):
    z_hr, z_lr, noise = (z.double() for z in latents())
    abar, strength = ABAR.double(), torch.tensor([1.0, 0.5, 1.0, 0.25], dtype=torch.float64)
    noisy, target = noisy_and_target(z_hr, z_lr, noise, abar, strength, prediction)
    torch.testing.assert_close(clean_latent(target, noisy, column(abar), prediction), z_hr)
    torch.testing.assert_close(model_output(z_hr, noisy, column(abar), prediction), target)


def test_training_meets_the_latent_that_guided_sampling_makes():
    """A base that predicts the HR latent, guided: the next latent is noised from the pulled one."""
    z_hr, z_lr, noise = (z.double() for z in latents())
    abar, strength = ABAR.double(), torch.tensor([1.0, 0.5, 1.0, 0.25], dtype=torch.float64)
    noisy, _ = noisy_and_target(z_hr, z_lr, noise, abar, strength, "epsilon")
    pulled = z_hr + pull_to_lr(z_hr, z_lr, column(strength))
    torch.testing.assert_close(clean_latent(noise, noisy, column(abar), "epsilon"), pulled)
    torch.testing.assert_close(pulled[0], z_lr[0])
    torch.testing.assert_close(pulled[1], (z_lr[1] + z_hr[1]) / 2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_snr_weight_caps_what_an_error_of_the_clean_latent_costs(prediction):
    abar = torch.tensor([0.99, 0.9, 0.5, 0.1], dtype=torch.float64)
    off = [clean_latent(output, torch.zeros(()), abar, prediction) for output in (torch.zeros(()), torch.ones(()))]
    error_of_clean_latent = (off[1] - off[0]) ** 2  # of a base that errs by 1
    snr = abar / (1 - abar)
    torch.testing.assert_close(snr_weight(abar, 5.0, prediction), snr.clamp(max=5) * error_of_clean_latent)


def test_the_loss_is_weighted_by_sample():
    z_hr, z_lr, noise = latents()
    _, target = noisy_and_target(z_hr, z_lr, noise, ABAR, torch.zeros(4), "epsilon")
    output = torch.zeros_like(target).bfloat16()
    plain = denoising_loss(output, target, ABAR, "epsilon")
    torch.testing.assert_close(plain, target.square().mean((1, 2, 3)))
    weighted = denoising_loss(output, target, ABAR, "epsilon", snr_gamma=5.0)
    torch.testing.assert_close(weighted, plain * snr_weight(ABAR, 5.0, "epsilon"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_on_pictures_the_loss_is_the_error_of_what_the_predicted_clean_latent_decodes_to(prediction, dtype):
    from deedsr.sampling.autoencoder import decode_latents
    from pipelines.training.adapter_stage import AdapterStage
    from pipelines.training.config import AdapterModelOptions, AdapterOptions, DiffusionOptions

    options = AdapterOptions(
        base="tiny", learner="tiny", model=AdapterModelOptions(preset="tiny"), diffusion=DiffusionOptions(pictures=True)
    )
    stage = AdapterStage(options, 4)
    stage.build(torch.device("cpu"), dtype)
    stage.scheduler.register_to_config(prediction_type=prediction)
    draw = torch.Generator().manual_seed(0)
    lr_crop, hr_crop = torch.rand(2, 3, 16, 16, generator=draw), torch.rand(2, 3, 64, 64, generator=draw)
    batch = {"lr": lr_crop, "lr_crop": lr_crop, "hr_crop": hr_crop, "timestep": torch.tensor([10, 49])}
    batch |= {"encoding_noise": torch.zeros(2, 2, 1, 1, 1), "guidance": torch.ones(2)}
    _, z_hr, _ = stage._encoded(batch)
    batch["noise"] = torch.randn(z_hr.shape, generator=draw)
    abar = stage.scheduler.alphas_cumprod[batch["timestep"]].view(-1, 1, 1, 1)
    shift = torch.zeros((), requires_grad=True)

    def knowing(noisy, *_):
        """The output that stands for the clean latent of the HR."""
        return (model_output(z_hr, noisy, abar, prediction) + shift).to(dtype)

    loss = stage.losses(knowing, batch)
    with torch.no_grad():
        decoded = decode_latents(stage.vae, z_hr.to(dtype)).float()
    wanted = (decoded - (2 * hr_crop - 1)).abs().mean((1, 2, 3))
    torch.testing.assert_close(loss, wanted, rtol=1e-4 if dtype is torch.float32 else 0.05, atol=0)
    loss.sum().backward()
    assert shift.grad.abs() > 0


@pytest.mark.parametrize(("pictures", "noisy_at"), [(True, 0.0), (False, 1.0)])
def test_pictures_are_trained_on_at_the_temperature_that_is_recommended(pictures, noisy_at):
    from pipelines.training.adapter_stage import AdapterStage
    from pipelines.training.config import AdapterModelOptions, AdapterOptions, DiffusionOptions

    diffusion = DiffusionOptions(pictures=pictures)
    options = AdapterOptions(
        base="tiny", learner="tiny", model=AdapterModelOptions(preset="tiny"), diffusion=diffusion,
        sampling={"temperature": 0.0, "eta": 0.0},
    )  # fmt: skip
    stage = AdapterStage(options, 4)
    stage.build(torch.device("cpu"), torch.float32)
    lr, hr = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 64, 64)
    batch = {"lr": lr, "lr_crop": lr, "hr_crop": hr, "timestep": torch.tensor([49]), "guidance": torch.ones(1)}
    batch |= {"encoding_noise": torch.zeros(1, 2, 1, 1, 1)}
    z_lr, _, _ = stage._encoded(batch)
    batch["noise"], seen = torch.randn(z_lr.shape), []

    def network(noisy, *_):
        seen.append(noisy)
        return torch.zeros_like(noisy)

    stage.losses(network, batch)
    abar = stage.scheduler.alphas_cumprod[49]
    torch.testing.assert_close(seen[0], abar.sqrt() * z_lr + noisy_at * (1 - abar).sqrt() * batch["noise"])
