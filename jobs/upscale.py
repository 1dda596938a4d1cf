"""Enlarge pictures. One that cannot be read is listed under `failed` and does not stop the others.

EXIF, colour profile, transparency and 16 bits are kept as far as --format has them. The same command again continues:
what is there of the same picture, model and settings is reused.
"""

import dataclasses

from jobs.command import Command, Outcome
from pipelines.inference.options import UpscaleOptions


def run(options: UpscaleOptions) -> Outcome:
    from pipelines.inference.upscaling import upscale

    result = upscale(options)
    return Outcome(dataclasses.asdict(result), complete=not result.failed)


def check(options: UpscaleOptions) -> None:
    from pipelines.inference.upscaling import resized

    resized(options.factor, options.size)


COMMAND = Command(
    UpscaleOptions,
    run,
    operand="input",
    example="deedsr upscale photo.jpg --out upscaled --model tiny",
    check=check,
)
