"""What a recipe lets the columns of `draws.scalar_parameters` be, for whoever compares what was drawn with it."""

from __future__ import annotations

import math

from deedsr.degradation.draws import NOISE_FAMILIES, RESIZE_MODES
from deedsr.degradation.kernels import KERNELS
from deedsr.degradation.ranges import BlurRanges, DegradationRanges, NoiseRanges, ResizeRanges

__all__ = ["parameter_limits", "parameter_names", "parameter_shares", "parameter_step"]

_NAMES = {"kernel": KERNELS, "mode": RESIZE_MODES, "family": NOISE_FAMILIES, "gray": ("colour", "gray")}
_FLAGS = {"deg_clean": ("degraded", "clean"), "deg_jpeg_last": ("resize, sinc last", "JPEG last")}
_STEPS = {"size": 2.0, "quality": 1.0}  # kernels have odd sizes, qualities are whole numbers


def parameter_names(column: str) -> tuple[str, ...]:
    """What the values 0, 1, ... of a column stand for; empty where they are measured numbers."""
    return _FLAGS.get(column) or _NAMES.get(column.rpartition("_")[2], ())


def parameter_step(column: str) -> float:
    """The distance between neighbouring values of a column; 0 where they are continuous."""
    return _STEPS.get(column.rpartition("_")[2], 0.0)


def parameter_limits(ranges: DegradationRanges) -> dict[str, tuple[float, float]]:
    """The least and the greatest value that can be drawn, for every column of measured numbers."""
    final = ranges.final
    limits: dict[str, tuple[float, float]] = {}
    for step, blur in (("blur1", ranges.blur1), ("blur2", ranges.blur2)):
        limits |= {f"deg_{step}_{name}": pair for name, pair in _blur(blur).items()}
    for step, resize in (("resize1", ranges.resize1), ("resize2", ranges.resize2)):
        limits[f"deg_{step}_factor"] = _factor(resize)
    for step, noise in (("noise1", ranges.noise1), ("noise2", ranges.noise2)):
        limits[f"deg_{step}_sigma"], limits[f"deg_{step}_scale"] = noise.gaussian_sigma, noise.poisson_scale
    limits |= {"deg_sinc_size": final.kernel_size, "deg_sinc_cutoff": final.cutoff}
    return limits | {"deg_jpeg1_quality": ranges.jpeg1_quality, "deg_jpeg2_quality": final.jpeg_quality}


def _blur(blur: BlurRanges) -> dict[str, tuple[float, float]]:
    shapes = (*blur.beta_generalized, *blur.beta_plateau)
    return {
        "size": blur.kernel_size,
        "sigma_x": blur.sigma,
        "sigma_y": blur.sigma,
        "theta": (-math.pi, math.pi),
        "beta": (min(shapes), max(shapes)),
        "cutoff": (math.pi / 5, math.pi),
    }


def _factor(resize: ResizeRanges) -> tuple[float, float]:
    low, high = resize.factor
    return (low if resize.shares.down else 1.0, high if resize.shares.up else 1.0)


def parameter_shares(ranges: DegradationRanges) -> dict[str, dict[str, float]]:
    """How often each name of a column is to be drawn, among the samples in which one is drawn at all."""
    modes = {mode: ranges.resize_modes.count(mode) / len(ranges.resize_modes) for mode in RESIZE_MODES}
    degraded = 1 - ranges.clean_probability
    last = {mode: degraded * share for mode, share in modes.items()}
    last["bicubic"] += ranges.clean_probability  # a clean sample is the bicubic reduction
    jpeg_last = degraded * ranges.final.resize_first_probability
    shares = {
        "deg_clean": _two("deg_clean", ranges.clean_probability),
        "deg_jpeg_last": _two("deg_jpeg_last", jpeg_last),
        "deg_blur1_kernel": _kernels(ranges.blur1),
        "deg_blur2_kernel": _kernels(ranges.blur2),
        "deg_resize1_mode": modes,
        "deg_resize2_mode": modes,
        "deg_resize3_mode": last,
    }
    for step, noise in (("noise1", ranges.noise1), ("noise2", ranges.noise2)):
        shares |= {f"deg_{step}_{name}": pair for name, pair in _noise(noise).items()}
    return shares


def _two(column: str, second: float) -> dict[str, float]:
    return dict(zip(parameter_names(column), (1 - second, second), strict=True))


def _kernels(blur: BlurRanges) -> dict[str, float]:
    return {name: (1 - blur.sinc_probability) * share for name, share in blur.mix} | {"sinc": blur.sinc_probability}


def _noise(noise: NoiseRanges) -> dict[str, dict[str, float]]:
    gaussian, gray = noise.gaussian_probability, noise.gray_probability
    return {"family": dict(zip(NOISE_FAMILIES, (gaussian, 1 - gaussian), strict=True)), "gray": _two("gray", gray)}
