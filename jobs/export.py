"""Write a trained model and its base into one folder, which DeeDSRPipeline.from_pretrained loads without anything else.

--half stores the base's networks and the adapter in half precision, for half the bytes; they compute in full
precision unless a torch_dtype is asked for.
"""

import dataclasses

from jobs.command import Command, Outcome


@dataclasses.dataclass(kw_only=True)
class ExportOptions:
    model: str  # what `train adapter` wrote: folder, URI or models:/NAME/VERSION; or tiny
    out: str  # the pipeline's folder, empty or not there yet: path or s3://bucket/prefix
    base: str | None = None  # where the model's base lies: folder, URI or hub id; null = where the model says
    half: bool = False  # store the weights in half precision


def run(options: ExportOptions) -> Outcome:
    from pipelines.models import Model, export_pipeline

    return Outcome(export_pipeline(Model.find(options.model, options.base), options.out, half=options.half))


COMMAND = Command(ExportOptions, run, operand="model", example="deedsr export runs/adapter --out pipeline --half")
