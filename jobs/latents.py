"""Compute the outputs of stage 2's frozen networks once, instead of in each step: latents and degradation vectors.

Writes a dataset of latents: for each shard of --data one with the same keys, which `deedsr train adapter` takes as its
--data, without the pixels, on the same base and learner. Without --learner the LR images are kept, and the learner
runs while training. The same command again continues, and reuses every shard of the same pixels and networks.
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import PositiveInt

from jobs.command import Command, Outcome
from jobs.shards import tracked
from pipelines import tracking
from pipelines.models import Base, Learner

if TYPE_CHECKING:
    from pipelines.shards import ShardsResult
    from pipelines.shards.execute import Job


@dataclasses.dataclass
class LatentsOptions:
    data: Annotated[str, "degradation shards"]
    out: Annotated[str, "the dataset of latents: folder or s3://bucket/prefix"]
    base: Annotated[str, "frozen model whose VAE encodes: `tiny`, a diffusers folder or URI, or a hub id"] = "tiny"
    learner: Annotated[str | None, "output of `deedsr train learner`; null = store LR images, not vectors"] = None
    precision: Annotated[Literal["fp32", "bf16"], "precision of the VAE; bf16 needs a GPU"] = "fp32"
    batch_size: Annotated[PositiveInt, "images encoded together"] = 8
    device: Annotated[Literal["auto", "cpu", "cuda"], "auto = a CUDA GPU if there is one; on a cluster, cuda"] = "auto"
    workers: Annotated[PositiveInt | None, "concurrent workers; null = one per GPU, or per CPU with device cpu"] = None
    tracking: Annotated[bool, "log an MLflow run"] = True
    experiment: Annotated[str, "MLflow experiment"] = "deedsr-latents"


def run(options: LatentsOptions) -> Outcome:
    from pipelines.data.dataset import Dataset
    from pipelines.shards.encode import make_latents

    base, learner = _networks(options)

    def make(run: tracking.Run | None) -> "ShardsResult":
        if run:
            run.log_dataset(pixels, context="pixels")
        names = ("precision", "batch_size", "workers", "device")
        chosen = {name: getattr(options, name) for name in names}
        return make_latents(options.data, base, learner, options.out, **chosen)

    pixels, parents = Dataset.open(options.data), {}
    if options.tracking:
        made_by = {"deedsr.kind": "shards", "deedsr.dataset.digest": pixels.digest}
        parents = {"shards": tracking.find_run(None, made_by), "learner": learner.run_id if learner else None}
    return Outcome(tracked(options, "latents", make, config=dataclasses.asdict(options), parents=parents))


def job(options: LatentsOptions) -> "Job":
    from pipelines.shards.encode import latents_job

    return latents_job(options.data, *_networks(options), options.out, options.precision)


def _networks(options: LatentsOptions) -> tuple[Base, Learner | None]:
    return Base.find(options.base), Learner.find(options.learner) if options.learner else None


COMMAND = Command(
    LatentsOptions,
    run,
    tracked="latents",
    example="deedsr latents --data shards --base tiny --learner runs/learner --out latents",
)
