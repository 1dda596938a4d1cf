"""Options of every command that samples pictures."""

import dataclasses
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt


@dataclasses.dataclass(kw_only=True)
class SamplingOptions:
    """null stands for what the model itself recommends."""

    steps: PositiveInt | None = None  # sampling steps; null = the model's own, for the paper's model 50
    noise_guidance: ClosedUnitInterval | None = None  # strength, 0 = off; null = the model's own, for the paper's 1
    noise_guidance_share: ClosedUnitInterval | None = None  # share of the steps that are guided; 0 = the first only
    eta: ClosedUnitInterval | None = None  # 0 = deterministic sampling, 1 = fresh noise in every step
    color_fix: Literal["none", "adain", "wavelet"] | None = None  # how the colours of the input are kept
    solver: Literal["ddim", "dpm"] | None = None  # dpm = second order, good pictures in fewer steps, such as 15
    tile: NonNegativeInt | None = None  # pixels of the output a side; larger pictures are made in tiles; 0 = as a whole
    degradation_per_tile: bool | None = None  # learn the degradation from each tile by itself; for collages
    restoration: ClosedUnitInterval | None = None  # share of the model's picture in the result, bicubic is the rest
    seed: NonNegativeInt = 0  # of the noise: the same seed gives the same picture

    def sampling(self) -> dict[str, Any]:
        """What `upscale` and `evaluate` of `pipelines.inference` take of these."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingOptions)}
