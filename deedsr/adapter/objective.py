"""The training objective of stage 2, and the algebra of noisy latents that training shares with noise guidance.

A noisy latent is x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, where abar is the share of signal power at timestep t. What
the base predicts (`prediction`) is "epsilon", "v_prediction" (sqrt(abar) eps - sqrt(1 - abar) x_0) or "sample" (x_0).

By default the adapter learns to denoise HR latents, as in the paper. With a guidance strength it learns to denoise what
guided sampling makes: x_t then holds an HR latent pulled to the LR latent, and its target is still the HR latent's. The
picture that the predicted clean latent decodes to can be compared with the HR picture in place of all that.

Pure functions of fp32 tensors; `abar` and `strength` broadcast. Shape suffixes: B batch, C channels, h w latent space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pull_to_lr(x_0: Tensor, z_lr: Tensor, strength: Tensor | float) -> Tensor:
    """What noise guidance adds to a clean latent: nothing at strength 0, the whole way to the LR latent at 1."""
    return strength * (z_lr - x_0)


def add_noise(x_0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """x_t of a clean latent."""
    return abar.sqrt() * x_0 + (1 - abar).sqrt() * eps


def clean_latent(output: Tensor, x_t: Tensor, abar: Tensor, prediction: str) -> Tensor:
    """x_0 of a model output."""
    if prediction == "epsilon":
        return (x_t - (1 - abar).sqrt() * output) / abar.sqrt()
    if prediction == "v_prediction":
        return abar.sqrt() * x_t - (1 - abar).sqrt() * output
    return output


def model_output(x_0: Tensor, x_t: Tensor, abar: Tensor, prediction: str) -> Tensor:
    """The model output at x_t that stands for x_0; the inverse of `clean_latent`."""
    if prediction == "sample":
        return x_0
    return output_of(x_0, (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt(), abar, prediction)


def output_of(x_0: Tensor, eps: Tensor, abar: Tensor, prediction: str) -> Tensor:
    """The model output for clean latent and noise."""
    if prediction == "epsilon":
        return eps
    return abar.sqrt() * eps - (1 - abar).sqrt() * x_0 if prediction == "v_prediction" else x_0


def noisy_and_target(
    z_hr_BChw: Tensor, z_lr_BChw: Tensor, noise_BChw: Tensor, abar_B: Tensor, strength_B: Tensor, prediction: str
) -> tuple[Tensor, Tensor]:
    """Input x_t of the base and what it should predict.

    x_t is noised from the pulled HR latent. Written as a noisy HR latent, its eps also holds the pull, so that the
    target leads to the HR latent at any strength.
    """
    abar, strength = (x_B.view(-1, 1, 1, 1) for x_B in (abar_B, strength_B))
    pull = pull_to_lr(z_hr_BChw, z_lr_BChw, strength)
    eps = noise_BChw + (abar / (1 - abar)).sqrt() * pull
    return add_noise(z_hr_BChw + pull, noise_BChw, abar), output_of(z_hr_BChw, eps, abar, prediction)


def denoising_loss(
    output_BChw: Tensor, target_BChw: Tensor, abar_B: Tensor, prediction: str, snr_gamma: float = 0.0
) -> Tensor:
    """Squared error of each sample (B,), weighted by `snr_weight` where `snr_gamma` is above 0."""
    loss_B = F.mse_loss(output_BChw.float(), target_BChw, reduction="none").mean((1, 2, 3))
    return loss_B * snr_weight(abar_B, snr_gamma, prediction) if snr_gamma else loss_B


def picture_loss(picture_BCHW: Tensor, hr_BCHW: Tensor) -> Tensor:
    """Mean absolute error of each picture (B,), decoded from a predicted clean latent; both in [-1, 1]."""
    return F.l1_loss(picture_BCHW.float(), hr_BCHW, reduction="none").mean((1, 2, 3))


def snr_weight(abar_B: Tensor, gamma: float, prediction: str) -> Tensor:
    """Loss weight under which the squared error of the clean latent counts min(SNR, gamma) times.

    Hang et al. 2023 (arXiv 2303.09556).
    """
    snr_B = abar_B / (1 - abar_B)
    of_clean_latent_B = {"epsilon": snr_B, "v_prediction": snr_B + 1}.get(prediction, torch.ones_like(snr_B))
    return snr_B.clamp(max=gamma) / of_clean_latent_B
