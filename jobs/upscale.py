"""Enlarge pictures with a trained model."""

import dataclasses
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from jobs.command import Command, Outcome


@dataclasses.dataclass
class UpscaleOptions:
    input: list[str]  # files, folders or URIs
    out: str  # folder of the results
    model: str = "tiny"  # folder or URI written by `train adapter`, or tiny
    steps: PositiveInt = 50  # sampling steps
    noise_guidance: NonNegativeFloat = 1.0  # strength; 0 = off
    color_fix: Literal["none", "adain", "wavelet"] = "adain"  # takes the colours of the input
    seed: NonNegativeInt = 0  # of the sampling noise
    tile: PositiveInt | None = None  # input pixels per side of a tile; null = the whole picture at once


def run(options: UpscaleOptions) -> Outcome:
    from pipelines.upscaling import upscale

    result = upscale(**dataclasses.asdict(options))
    return Outcome(dataclasses.asdict(result), complete=not result.failed)


COMMAND = Command(UpscaleOptions, run, operand="input", example="deedsr upscale photo.jpg --out upscaled --model tiny")
