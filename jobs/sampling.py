"""Options of every command that samples pictures, under the names that `pipelines.upscaling.upscale` gives them."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

UnitInterval = Annotated[float, Field(ge=0, le=1)]


@dataclasses.dataclass(kw_only=True)
class SamplingOptions:
    """Which model samples, where and how; null = the default that is stored with the model."""

    base: Annotated[str | None, "folder, URI or hub id of the model's base; null = as recorded in the model"] = None
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "auto = CUDA if there is a GPU; cluster: cuda"] = "auto"
    steps: Annotated[PositiveInt | None, "sampling steps; null = the model's default, paper: 50"] = None
    noise_guidance: Annotated[UnitInterval | None, "strength; 0 = off; null = the model's default, paper: 1"] = None
    noise_guidance_share: Annotated[UnitInterval | None, "fraction of guided steps; 0 = first step only"] = None
    eta: Annotated[UnitInterval | None, "0 = deterministic (DDIM), 1 = new noise in every step"] = None
    color_fix: Annotated[Literal["none", "adain", "wavelet"] | None, "colour correction to the input"] = None
    solver: Annotated[Literal["ddim", "dpm"] | None, "dpm: second-order solver for about 15 steps"] = None
    tile: Annotated[NonNegativeInt | None, "output pixels per side of a tile; 0 = no tiling"] = None
    degradation_per_tile: Annotated[bool | None, "one degradation vector per tile, for collages"] = None
    restoration: Annotated[UnitInterval | None, "weight of the model's output; the rest is bicubic"] = None
    seed: Annotated[NonNegativeInt, "seed of the sampling noise"] = 0
