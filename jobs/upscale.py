"""Enlarge pictures. One that cannot be read is listed under `failed` and does not stop the others.

EXIF, colour profile, transparency and 16 bits are kept as far as --format has them. The same command again continues:
what is there of the same picture, model and settings is reused.
"""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from jobs.command import Command, Outcome
from jobs.sampling import SamplingOptions


@dataclasses.dataclass(kw_only=True)
class UpscaleOptions(SamplingOptions):
    input: Annotated[list[str], "files, folders, URIs or patterns such as 's3://bucket/a/*.jpg'"]
    out: Annotated[str, "output: folder or s3://bucket/prefix"]
    model: Annotated[str, "what `train adapter` wrote: folder, URI or models:/NAME/VERSION; or tiny"] = "tiny"
    format: Annotated[Literal["png", "jpeg", "webp", "same"], "output format; same = the input's, else PNG"] = "png"
    quality: Annotated[PositiveInt, "JPEG and WebP quality, 1 to 100"] = 95
    factor: Annotated[float | None, Field(ge=1), "size of a result / its input; null = the model's; 1 = clean only"] = (
        None
    )
    size: Annotated[str | None, "WIDTHxHEIGHT that results fit into, instead of --factor"] = None
    overwrite: Annotated[bool, "recompute and replace existing outputs (never an input)"] = False
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto = fp16 on a CUDA GPU, else fp32"] = "auto"
    ray: Annotated[bool, "run on the Ray cluster of RAY_ADDRESS, or on all CPUs or GPUs of this machine"] = False
    workers: Annotated[PositiveInt | None, "with --ray: concurrent workers; null = one per GPU (or per CPU)"] = None


def run(options: UpscaleOptions) -> Outcome:
    from pipelines.inference.upscaling import upscale

    values = dataclasses.asdict(options)
    result = upscale(values.pop("input"), **values)
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
