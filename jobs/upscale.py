"""Enlarge pictures. One that cannot be read is listed under `failed` and does not stop the others."""

import dataclasses

from jobs.command import Command, Outcome
from jobs.sampling import SamplingOptions


@dataclasses.dataclass(kw_only=True)
class UpscaleOptions(SamplingOptions):
    input: list[str]  # files, folders or URIs
    out: str  # where the results go: folder or s3://bucket/prefix
    model: str = "tiny"  # what `train adapter` wrote: folder, URI or models:/NAME/VERSION; or tiny


def run(options: UpscaleOptions) -> Outcome:
    from pipelines.upscaling import upscale

    result = upscale(options.input, options.out, model=options.model, **options.sampling())
    return Outcome(dataclasses.asdict(result), complete=not result.failed)


COMMAND = Command(UpscaleOptions, run, operand="input", example="deedsr upscale photo.jpg --out upscaled --model tiny")
