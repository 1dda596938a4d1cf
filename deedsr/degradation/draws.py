"""The random draws of one sample's degradation, in order, from the sample's own generator (docs/method.md).

The reference draws resize, noise family, second blur, order of the last step and the clean flag once per batch; here
everything is drawn per sample, so that the samples of a batch share nothing.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from deedsr.degradation.kernels import KERNELS
from deedsr.degradation.ranges import BlurRanges, DegradationRanges, NoiseRanges, ResizeRanges
from deedsr.degradation.resizing import RESIZE_MODES

NOISE_FAMILIES = ("gaussian", "poisson")
_LEAST_SIDE = 16

# Columns of `samples.parquet` by step. A value that a sample did not draw is NaN.
_BLUR = ("kernel", "size", "sigma_x", "sigma_y", "theta", "beta", "cutoff")
_NOISE = ("family", "sigma", "scale", "gray")
_COLUMNS: dict[str, tuple[str, ...]] = {
    "blur1": _BLUR,
    "resize1": ("mode", "factor"),
    "noise1": _NOISE,
    "jpeg1": ("quality",),
    "blur2": _BLUR,
    "resize2": ("mode", "factor"),
    "noise2": _NOISE,
    "resize3": ("mode",),
    "sinc": ("size", "cutoff"),
    "jpeg2": ("quality",),
}
# Columns of `scalar_parameters`, in order.
SCALAR_COLUMNS = (
    "deg_clean",
    "deg_jpeg_last",
    *(f"deg_{step}_{column}" for step, columns in _COLUMNS.items() for column in columns),
)
_CODES = {"kernel": KERNELS, "mode": RESIZE_MODES, "family": NOISE_FAMILIES}


def draw_degradation(
    ranges: DegradationRanges, size: tuple[int, int], scale: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Draw the degradation of one HR image of `size` (height, width) to an LR image `scale` times smaller.

    Depends on nothing but its arguments. The result is plain JSON data: `size`, `scale`, `clean` and `steps`, the list
    of operations in order with all their parameters; noise fields are named by a 64-bit seed. Raises `ValueError` for
    an image too small to be resized twice.
    """
    height, width = size
    if min(size) < _LEAST_SIDE:
        raise ValueError(f"an HR image must be at least {_LEAST_SIDE} px a side, got {height}x{width}")
    lr_size = [height // scale, width // scale]
    draws: dict[str, Any] = {"size": [height, width], "scale": scale, "clean": rng.random() < ranges.clean_probability}
    if draws["clean"]:
        return draws | {"steps": [{"step": "resize3", "mode": "bicubic", "size": lr_size}]}

    steps = _blur("blur1", ranges.blur1, rng)
    steps += [{"step": "resize1", "mode": _pick(ranges.resize_modes, rng), "factor": _factor(ranges.resize1, rng)}]
    steps += [_noise("noise1", ranges.noise1, rng)]
    steps += [{"step": "jpeg1", "quality": _integer(ranges.jpeg1_quality, rng)}]

    steps += _blur("blur2", ranges.blur2, rng)
    mode, factor = _pick(ranges.resize_modes, rng), _factor(ranges.resize2, rng)
    middle = [max(1, int(height / scale * factor)), max(1, int(width / scale * factor))]
    steps += [{"step": "resize2", "mode": mode, "factor": factor, "size": middle}]
    steps += [_noise("noise2", ranges.noise2, rng)]

    final = ranges.final
    reduce: list[dict[str, Any]] = [{"step": "resize3", "mode": _pick(ranges.resize_modes, rng), "size": lr_size}]
    if rng.random() < final.sinc_probability:
        kernel_size = _odd(final.kernel_size, rng)
        reduce += [{"step": "sinc", "kernel": "sinc", "size": kernel_size, "cutoff": _uniform(final.cutoff, rng)}]
    compress = [{"step": "jpeg2", "quality": _integer(final.jpeg_quality, rng)}]
    steps += reduce + compress if rng.random() < final.resize_first_probability else compress + reduce
    return draws | {"steps": steps}


def scalar_parameters(draws: dict[str, Any]) -> dict[str, float]:
    """The draws as flat numbers `deg_{step}_{parameter}`: the same columns for every sample, NaN where not drawn.

    Kernels, resize modes and noise families are given by their index in `KERNELS`, `RESIZE_MODES`, `NOISE_FAMILIES`;
    `deg_jpeg_last` says whether the second JPEG came last.
    """
    steps = {step["step"]: step for step in draws["steps"]}
    flat = {
        "deg_clean": float(draws["clean"]),
        "deg_jpeg_last": float(draws["steps"][-1]["step"] == "jpeg2"),
    }
    for step, columns in _COLUMNS.items():
        for column in columns:
            value = steps.get(step, {}).get(column, math.nan)
            flat[f"deg_{step}_{column}"] = float(_CODES[column].index(value) if isinstance(value, str) else value)
    return flat


def _blur(step: str, ranges: BlurRanges, rng: np.random.Generator) -> list[dict[str, Any]]:
    """One blur step, or none."""
    if rng.random() >= ranges.probability:
        return []
    size = _odd(ranges.kernel_size, rng)
    if rng.random() < ranges.sinc_probability:
        # The reference's rule: small kernels cannot hold the ringing of a low cutoff.
        low = math.pi / 3 if size < 13 else math.pi / 5
        return [{"step": step, "kernel": "sinc", "size": size, "cutoff": _uniform((low, math.pi), rng)}]
    kernel = _weighted(ranges.mix, rng)
    sigma = _uniform(ranges.sigma, rng)
    blur = {"step": step, "kernel": kernel, "size": size, "sigma_x": sigma, "sigma_y": sigma, "theta": 0.0}
    if kernel.endswith("anisotropic"):
        blur |= {"sigma_y": _uniform(ranges.sigma, rng), "theta": _uniform((-math.pi, math.pi), rng)}
    if kernel.startswith("generalized"):
        blur |= {"beta": _around_one(ranges.beta_generalized, rng)}
    if kernel.startswith("plateau"):
        blur |= {"beta": _around_one(ranges.beta_plateau, rng)}
    return [blur]


def _factor(ranges: ResizeRanges, rng: np.random.Generator) -> float:
    low, high = ranges.factor
    direction = _weighted(ranges.shares, rng)
    return _uniform({"up": (1.0, high), "down": (low, 1.0), "keep": (1.0, 1.0)}[direction], rng)


def _noise(step: str, ranges: NoiseRanges, rng: np.random.Generator) -> dict[str, Any]:
    noise: dict[str, Any] = {"step": step}
    if rng.random() < ranges.gaussian_probability:
        noise |= {"family": "gaussian", "sigma": _uniform(ranges.gaussian_sigma, rng)}
    else:
        noise |= {"family": "poisson", "scale": _uniform(ranges.poisson_scale, rng)}
    seed = int(rng.integers(2**64, dtype=np.uint64))
    return noise | {"gray": rng.random() < ranges.gray_probability, "seed": seed}


def _uniform(pair: tuple[float, float], rng: np.random.Generator) -> float:
    return pair[0] + (pair[1] - pair[0]) * rng.random()


def _around_one(pair: tuple[float, float], rng: np.random.Generator) -> float:
    """Half of the time below 1, half above."""
    return _uniform((pair[0], 1.0) if rng.random() < 0.5 else (1.0, pair[1]), rng)


def _integer(pair: tuple[int, int], rng: np.random.Generator) -> int:
    return pair[0] + int((pair[1] - pair[0] + 1) * rng.random())


def _odd(pair: tuple[int, int], rng: np.random.Generator) -> int:
    return 2 * _integer((pair[0] // 2, pair[1] // 2), rng) + 1


def _pick(values: tuple[str, ...], rng: np.random.Generator) -> str:
    return values[_integer((0, len(values) - 1), rng)]


def _weighted(shares: Iterable[tuple[str, float]], rng: np.random.Generator) -> str:
    """The name of one of the shares, which sum to 1."""
    left = rng.random()
    for name, share in shares:
        if share:
            chosen = name
            left -= share
        if left < 0:
            break
    return chosen


# Expected range and frequency of each column, for checking a dataset against its recipe

_NAMES = {**_CODES, "gray": ("colour", "gray")}
_FLAGS = {"deg_clean": ("degraded", "clean"), "deg_jpeg_last": ("resize, sinc last", "JPEG last")}
_STEPS = {"size": 2.0, "quality": 1.0}  # between neighbouring values


def parameter_names(column: str) -> tuple[str, ...]:
    """Names of the values 0, 1, ... of a categorical column; empty for a numeric column."""
    return _FLAGS.get(column) or _NAMES.get(column.rpartition("_")[2], ())


def parameter_step(column: str) -> float:
    """The distance between neighbouring values of a column; 0 where they are continuous."""
    return _STEPS.get(column.rpartition("_")[2], 0.0)


def parameter_limits(ranges: DegradationRanges) -> dict[str, tuple[float, float]]:
    """The least and the greatest value that can be drawn, for every column of measured numbers."""
    final = ranges.final
    limits: dict[str, tuple[float, float]] = {}
    for step, blur in (("blur1", ranges.blur1), ("blur2", ranges.blur2)):
        shapes = (*blur.beta_generalized, *blur.beta_plateau)
        limits |= {f"deg_{step}_size": blur.kernel_size, f"deg_{step}_theta": (-math.pi, math.pi)}
        limits |= {f"deg_{step}_sigma_x": blur.sigma, f"deg_{step}_sigma_y": blur.sigma}
        limits |= {f"deg_{step}_beta": (min(shapes), max(shapes)), f"deg_{step}_cutoff": (math.pi / 5, math.pi)}
    for step, resize in (("resize1", ranges.resize1), ("resize2", ranges.resize2)):
        low, high = resize.factor
        limits[f"deg_{step}_factor"] = (low if resize.shares.down else 1.0, high if resize.shares.up else 1.0)
    for step, noise in (("noise1", ranges.noise1), ("noise2", ranges.noise2)):
        limits[f"deg_{step}_sigma"], limits[f"deg_{step}_scale"] = noise.gaussian_sigma, noise.poisson_scale
    limits |= {"deg_sinc_size": final.kernel_size, "deg_sinc_cutoff": final.cutoff}
    return limits | {"deg_jpeg1_quality": ranges.jpeg1_quality, "deg_jpeg2_quality": final.jpeg_quality}


def parameter_shares(ranges: DegradationRanges) -> dict[str, dict[str, float]]:
    """How often each name of a column is to be drawn, among the samples in which one is drawn at all."""
    modes = {mode: ranges.resize_modes.count(mode) / len(ranges.resize_modes) for mode in RESIZE_MODES}
    degraded = 1 - ranges.clean_probability
    last = {mode: degraded * share for mode, share in modes.items()}
    last["bicubic"] += ranges.clean_probability  # a clean sample is the bicubic reduction
    jpeg_last = degraded * ranges.final.resize_first_probability
    shares = {
        "deg_clean": _two_shares("deg_clean", ranges.clean_probability),
        "deg_jpeg_last": _two_shares("deg_jpeg_last", jpeg_last),
        "deg_blur1_kernel": _kernel_shares(ranges.blur1),
        "deg_blur2_kernel": _kernel_shares(ranges.blur2),
        "deg_resize1_mode": modes,
        "deg_resize2_mode": modes,
        "deg_resize3_mode": last,
    }
    for step, noise in (("noise1", ranges.noise1), ("noise2", ranges.noise2)):
        gaussian = noise.gaussian_probability
        shares[f"deg_{step}_family"] = dict(zip(NOISE_FAMILIES, (gaussian, 1 - gaussian), strict=True))
        shares[f"deg_{step}_gray"] = _two_shares("gray", noise.gray_probability)
    return shares


def _two_shares(column: str, second: float) -> dict[str, float]:
    return dict(zip(parameter_names(column), (1 - second, second), strict=True))


def _kernel_shares(blur: BlurRanges) -> dict[str, float]:
    return {name: (1 - blur.sinc_probability) * share for name, share in blur.mix} | {"sinc": blur.sinc_probability}
