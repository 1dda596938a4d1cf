"""Colour correction: give a sampled picture the colours of the enlarged LR image.

Diffusion models drift in colour and brightness; the LR image is right about both. Pictures are corrected in place and
in strips of rows, so that a large one needs little memory beside itself.
"""

from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import conv2d, pad

from deedsr.precision import wide
from deedsr.sampling.images import strips

WAVELET_LEVELS = 5
WAVELET_REACH = 2**WAVELET_LEVELS - 1  # pixels

Rows = Callable[[slice], torch.Tensor]  # rows of the reference, (B, C, rows, W)


def fix_color(method: str, image_BCHW: torch.Tensor, reference: Rows) -> None:
    """Applies one of `settings.COLOR_FIXES` in place; image and reference have the same size and range."""
    parts = strips(*image_BCHW.shape[2:])
    if method == "adain":
        adain(image_BCHW, reference, parts)
    elif method == "wavelet":
        wavelet(image_BCHW, reference, parts)


def adain(image_BCHW: torch.Tensor, reference: Rows, parts: list[slice]) -> None:
    """Sets mean and standard deviation of each image's channels to those of its reference."""
    mean, deviation = _moments(image_BCHW[:, :, rows] for rows in parts)
    reference_mean, reference_deviation = _moments(map(reference, parts))
    image_BCHW.sub_(mean).div_(deviation).mul_(reference_deviation).add_(reference_mean)


def _moments(parts: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel over all parts."""
    each = [(x.shape[2] * x.shape[3], x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True)) for x in parts]
    total, zero = sum(count for count, _, _ in each), torch.zeros(())
    mean = sum((count / total * wide(one) for count, one, _ in each), zero)
    squares = sum(((count - 1) * wide(of) + count * (one - mean) ** 2 for count, one, of in each), zero)
    kind = each[0][1].dtype
    return mean.to(kind), ((squares / (total - 1)).to(kind) + 1e-5).sqrt()


def wavelet(image_BCHW: torch.Tensor, reference: Rows, parts: list[slice]) -> None:
    """Keeps each image's detail and takes what is coarser than 2 ** WAVELET_LEVELS pixels from its reference."""
    above = image_BCHW[:, :, :0]  # rows above the part, before correction
    for rows in parts:
        top, bottom = rows.start - above.shape[2], min(rows.stop + WAVELET_REACH, image_BCHW.shape[2])
        seen = torch.cat([above, image_BCHW[:, :, rows.start : bottom]], 2)
        change = _coarse(reference(slice(top, bottom)) - seen)
        image_BCHW[:, :, rows] += change[:, :, rows.start - top : rows.stop - top]
        above = seen[:, :, max(rows.stop - top - WAVELET_REACH, 0) : rows.stop - top]


def _coarse(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Residue of the a-trous wavelet transform: binomial blurs of doubling distance, edges repeated."""
    channels = x_BCHW.shape[1]
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=x_BCHW.dtype, device=x_BCHW.device)
    kernel = torch.outer(taps, taps).expand(channels, 1, 3, 3)
    for level in range(WAVELET_LEVELS):
        reach = 2**level
        x_BCHW = conv2d(pad(x_BCHW, [reach] * 4, mode="replicate"), kernel, dilation=reach, groups=channels)
    return x_BCHW
