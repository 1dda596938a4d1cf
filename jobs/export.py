"""Write a trained model and its base into one folder, which DeeDSRPipeline.from_pretrained loads without anything else.

--half stores the base's networks and the adapter in half precision, in half the bytes; they are loaded in full
precision unless torch_dtype is given.
"""

import dataclasses
from typing import Annotated

from jobs.command import Command, Outcome
from pipelines.models import Model, export_pipeline


@dataclasses.dataclass(kw_only=True)
class ExportOptions:
    model: Annotated[str, "what `train adapter` wrote: folder, URI or models:/NAME/VERSION; or tiny"]
    out: Annotated[str, "the pipeline's folder, empty or not there yet: path or s3://bucket/prefix"]
    base: Annotated[str | None, "folder, URI or hub id of the model's base; null = as recorded in the model"] = None
    half: Annotated[bool, "store the weights in half precision"] = False


def run(options: ExportOptions) -> Outcome:
    return Outcome(export_pipeline(Model.find(options.model, options.base), options.out, half=options.half))


COMMAND = Command(ExportOptions, run, operand="model", example="deedsr export runs/adapter --out pipeline --half")
