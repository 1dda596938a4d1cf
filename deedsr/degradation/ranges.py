"""Ranges of the second-order degradation (docs/method.md, degradation). The numbers are in `recipes/*.yaml`.

Every range is `[low, high]`, drawn uniformly. Blur widths are in pixels, noise in 8-bit levels, cutoffs in radians per
pixel.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _must_be(what: str, holds: Callable[[Any], bool]) -> AfterValidator:
    """A check of a value, or of a pair of values."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"must be {what}, got {list(value) if isinstance(value, tuple) else value}")
        return value

    return AfterValidator(check)


def _range(low: float, high: float) -> AfterValidator:
    limit = f"{low:g} <= low <= high" + (f" <= {high:g}" if math.isfinite(high) else "")
    return _must_be(f"a range [low, high] with {limit}", lambda pair: low <= pair[0] <= pair[1] <= high)


_AROUND_ONE = _must_be("a range [low, high] with 0 < low <= 1 <= high", lambda pair: 0 < pair[0] <= 1 <= pair[1])
_ODD = _must_be("odd kernel sizes [low, high]", lambda pair: pair[0] % 2 == 1 and pair[1] % 2 == 1)
Probability = Annotated[float, _must_be("a probability between 0 and 1", lambda value: 0 <= value <= 1)]
Sigma = Annotated[tuple[float, float], _range(0.01, 50)]
Level = Annotated[tuple[float, float], _range(0, 255)]
Shape = Annotated[tuple[float, float], _AROUND_ONE]
Factor = Annotated[tuple[float, float], _range(0.1, 4), _AROUND_ONE]
KernelSizes = Annotated[tuple[int, int], _range(3, 51), _ODD]
Cutoff = Annotated[tuple[float, float], _range(0.1, math.pi)]
Quality = Annotated[tuple[int, int], _range(1, 100)]
ResizeMode = Literal["area", "bilinear", "bicubic"]


class Strict(BaseModel):
    """Frozen; unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Shares(Strict):
    @model_validator(mode="after")
    def _complete(self) -> Self:
        total = sum(value for _, value in self)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"must sum to 1, got {total:g} from {', '.join(f'{k} {v:g}' for k, v in self)}")
        return self


class KernelMix(_Shares):
    """Shares of the blur kernels that are not sinc."""

    isotropic: Probability
    anisotropic: Probability
    generalized_isotropic: Probability
    generalized_anisotropic: Probability
    plateau_isotropic: Probability
    plateau_anisotropic: Probability


class BlurRanges(Strict):
    probability: Probability
    kernel_size: KernelSizes  # odd sizes, each as likely
    sinc_probability: Probability
    mix: KernelMix
    sigma: Sigma
    beta_generalized: Shape  # below 1 half of the time, above 1 the other half
    beta_plateau: Shape  # likewise


class ResizeShares(_Shares):
    up: Probability
    down: Probability
    keep: Probability


class ResizeRanges(Strict):
    shares: ResizeShares
    factor: Factor  # down: low to 1, up: 1 to high


class NoiseRanges(Strict):
    gaussian_probability: Probability  # else Poisson
    gaussian_sigma: Level
    poisson_scale: Annotated[tuple[float, float], _range(0, 20)]
    gray_probability: Probability  # the same noise in all three channels


class FinalRanges(Strict):
    """The last step: resize to the LR size and sinc filter, before or after the second JPEG."""

    resize_first_probability: Probability  # resize, sinc, JPEG; else JPEG, resize, sinc
    sinc_probability: Probability
    kernel_size: KernelSizes
    cutoff: Cutoff
    jpeg_quality: Quality


class DegradationRanges(Strict):
    """All ranges of the chain blur, resize, noise, JPEG, blur, resize, noise, final step."""

    clean_probability: Probability  # LR is the bicubic reduction and nothing else
    resize_modes: Annotated[tuple[ResizeMode, ...], Field(min_length=1)]
    blur1: BlurRanges
    resize1: ResizeRanges
    noise1: NoiseRanges
    jpeg1_quality: Quality
    blur2: BlurRanges
    resize2: ResizeRanges
    noise2: NoiseRanges
    final: FinalRanges
