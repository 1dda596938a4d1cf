"""Colour correction: give a sampled picture the colours of the enlarged LR image.

Diffusion models drift in colour and brightness; the LR image is right about both.
"""

import torch
from torch.nn.functional import conv2d, pad

COLOR_FIXES = ("none", "adain", "wavelet")
WAVELET_LEVELS = 5


def adain(image_BCHW: torch.Tensor, reference_BCHW: torch.Tensor) -> torch.Tensor:
    """Sets mean and standard deviation of each image's channels to those of its reference."""
    mean, deviation = _moments(image_BCHW)
    reference_mean, reference_deviation = _moments(reference_BCHW)
    return (image_BCHW - mean) / deviation * reference_deviation + reference_mean


def _moments(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    variance = x_BCHW.var(dim=(2, 3), keepdim=True)
    return x_BCHW.mean(dim=(2, 3), keepdim=True), (variance + 1e-5).sqrt()


def wavelet(image_BCHW: torch.Tensor, reference_BCHW: torch.Tensor) -> torch.Tensor:
    """Keeps each image's detail and takes what is coarser than 2 ** WAVELET_LEVELS pixels from its reference."""
    return image_BCHW + _coarse(reference_BCHW - image_BCHW)


def _coarse(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Residue of the a-trous wavelet transform: binomial blurs of doubling distance, edges repeated."""
    channels = x_BCHW.shape[1]
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=x_BCHW.dtype, device=x_BCHW.device)
    kernel = torch.outer(taps, taps).expand(channels, 1, 3, 3)
    for level in range(WAVELET_LEVELS):
        reach = 2**level
        x_BCHW = conv2d(pad(x_BCHW, [reach] * 4, mode="replicate"), kernel, dilation=reach, groups=channels)
    return x_BCHW


def fix_color(method: str, image_BCHW: torch.Tensor, reference_BCHW: torch.Tensor) -> torch.Tensor:
    """Applies one of COLOR_FIXES; images and references have the same shape and range."""
    if method == "none":
        return image_BCHW
    return {"adain": adain, "wavelet": wavelet}[method](image_BCHW, reference_BCHW)
