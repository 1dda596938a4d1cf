"""Compute the outputs of stage 2's frozen networks once, instead of in each step: latents and degradation vectors.

Writes a dataset of latents: for each shard of --data one with the same keys, which `deedsr train adapter` takes as its
--data, without the pixels, on the same base and learner. Without --learner the LR images are kept, and the learner
runs while training. The same command again continues, and reuses every shard of the same pixels and networks.
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PositiveInt

from jobs.command import Command, Outcome

if TYPE_CHECKING:
    from pipelines.shards import ShardsResult


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
    if options.tracking:
        return Outcome(_run_tracked(options))
    return Outcome(dataclasses.asdict(_make(options)))


def finished(options: LatentsOptions) -> dict[str, Any] | None:
    """The result where no shard would be made and MLflow has the run of the latents, else None. Makes nothing."""
    from pipelines import tracking
    from pipelines.models import Base, Learner
    from pipelines.shards.finished import finished_latents

    learner = Learner.find(options.learner) if options.learner else None
    found = finished_latents(options.data, Base.find(options.base), learner, options.out, options.precision)
    run_id = found and tracking.find_run(None, {"deedsr.kind": "latents", "deedsr.dataset.digest": found.digest})
    return dataclasses.asdict(found) | {"run_id": run_id} if found and run_id else None


def _make(options: LatentsOptions) -> "ShardsResult":
    from pipelines.models import Base, Learner
    from pipelines.shards.encode import make_latents

    return make_latents(
        options.data,
        Base.find(options.base),
        Learner.find(options.learner) if options.learner else None,
        options.out,
        precision=options.precision,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
    )


def _run_tracked(options: LatentsOptions) -> dict[str, Any]:
    from pipelines import tracking
    from pipelines.data.dataset import Dataset
    from pipelines.models import Learner

    pixels = Dataset.open(options.data)
    made_by = {"deedsr.kind": "shards", "deedsr.dataset.digest": pixels.digest}
    parents = {
        "shards": tracking.find_run(None, made_by),
        "learner": Learner.find(options.learner).run_id if options.learner else None,
    }
    with tracking.start_run(
        options.experiment,
        name=options.out.rstrip("/").rpartition("/")[2],
        config=dataclasses.asdict(options),
        parents=parents,
        tags={"deedsr.kind": "latents"},
        out=options.out,
    ) as run:
        run.log_dataset(pixels, context="pixels")
        result = _make(options)
        run.log_dataset(Dataset.open(options.out), context="latents")
        run.log_metrics({k: v for k, v in dataclasses.asdict(result).items() if isinstance(v, int | float)})
    return dataclasses.asdict(result) | {"run_id": run.id}


COMMAND = Command(
    LatentsOptions,
    run,
    tracked="latents",
    example="deedsr latents --data shards --base tiny --learner runs/learner --out latents",
)
