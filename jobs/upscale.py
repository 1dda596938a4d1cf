"""Enlarge pictures. One that cannot be read is listed under `failed` and does not stop the others.

EXIF, colour profile, transparency and 16 bits are kept as far as --format has them. The same command again continues:
what is there of the same picture, model and settings is reused.
"""

import dataclasses
from typing import Literal

from jsonargparse.typing import PositiveInt

from jobs.command import Command, Outcome
from jobs.sampling import SamplingOptions


@dataclasses.dataclass(kw_only=True)
class UpscaleOptions(SamplingOptions):
    input: list[str]  # files, folders, URIs or patterns such as 's3://bucket/a/*.jpg'
    out: str  # where the results go: folder or s3://bucket/prefix
    model: str = "tiny"  # what `train adapter` wrote: folder, URI or models:/NAME/VERSION; or tiny
    base: str | None = None  # where the model's base lies: folder, URI or hub id; null = where the model says
    format: Literal["png", "jpeg", "webp", "same"] = "png"  # of the results; same = as the input, PNG if it is another
    quality: PositiveInt = 95  # of JPEG and WebP, 1 to 100
    overwrite: bool = False  # make every result anew, and replace whatever lies in its place (never an input)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = a CUDA GPU if there is one, on a cluster always
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the networks; auto = fp16 on a CUDA GPU, else fp32
    ray: bool = False  # spread the pictures over the cluster of RAY_ADDRESS, or over this machine's CPUs or GPUs
    workers: PositiveInt | None = None  # with --ray, at a time; null = one on every GPU, or every CPU with device cpu


def run(options: UpscaleOptions) -> Outcome:
    from pipelines.inference.upscaling import upscale

    result = upscale(
        options.input,
        options.out,
        model=options.model,
        base=options.base,
        format=options.format,
        quality=options.quality,
        overwrite=options.overwrite,
        ray=options.ray,
        workers=options.workers,
        device=options.device,
        precision=options.precision,
        **options.sampling(),
    )
    return Outcome(dataclasses.asdict(result), complete=not result.failed)


COMMAND = Command(UpscaleOptions, run, operand="input", example="deedsr upscale photo.jpg --out upscaled --model tiny")
