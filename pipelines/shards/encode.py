"""Shards of latents: what the frozen networks of stage 2 make of a dataset's images, computed once.

A shard of latents is made of one shard of pixels: same keys, same split, same order. The work stays in Ray actors,
which load the networks once, on a GPU each where the cluster has some.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np

from deedsr.dataset.manifest import LatentsSource
from deedsr.dataset.members import LATENTS_EXTENSION, Latents, pack
from deedsr.errors import DeeDSRError, UsageError
from deedsr.hub.model_folder import load_part
from deedsr.hub.weights import part_digest
from pipelines.data.dataset import Dataset, decode_member, relative_place
from pipelines.data.index import require_hr
from pipelines.distribution import network_plan
from pipelines.models import Base, Learner, usable_device
from pipelines.placement import Device
from pipelines.shards.build import PLACES, Tars, member_of, rows_of, shard_draft
from pipelines.shards.generate import Job, ShardsResult, derived_plans, index_of, run_job
from pipelines.shards.plan import ShardPlan
from pipelines.shards.samples import Draft, Row
from pipelines.shards.shard import LATENTS_COLUMNS, ShardRecord
from pipelines.storage import Storage, open_storage

Precision = Literal["fp32", "bf16"]
_VERSION = 1  # of what a shard of latents holds: another one is other work


def make_latents(
    data: str,
    base: Base,
    learner: Learner | None,
    out: str,
    *,
    precision: Precision = "fp32",
    batch_size: int = 8,
    workers: int | None = None,
    device: Device = "auto",
    progress: bool = True,
) -> ShardsResult:
    """Makes or completes the dataset `out` of `latents_job`.

    `workers`: actors at a time, None = on every GPU, or every CPU where the device is the CPU. `device`: see
    `pipelines.placement.place_networks`. Shards of the same pixels and networks are reused. Raises UsageError for what
    cannot be used, DeeDSRError if the work failed; what was committed stays, and the same call continues from there.
    """
    job = latents_job(data, base, learner, out, precision, batch_size)
    assert isinstance(job.work, FromPixels)
    job.out.require_writable()
    plan = network_plan("latents", device, workers)
    return run_job(replace(job, work=replace(job.work, device=plan.device)), plan.workers, progress, actors=plan)


def latents_job(
    data: str, base: Base, learner: Learner | None, out: str, precision: Precision = "fp32", batch_size: int = 8
) -> Job:
    """Latents of the dataset `data` by the VAE of `base`, and the vectors of `learner`; without one the LR images are
    kept instead. Raises UsageError where the VAE cannot take the HR images."""
    from deedsr.sampling.autoencoder import downsampling_factor

    dataset = Dataset.open(data).require_pixels("--data")
    storage = open_storage(out)
    if storage.uri == dataset.uri:
        raise UsageError(f"--out {storage.uri} is the dataset that the pixels come from: choose another")
    require_hr(dataset)
    vae = load_part(base.path, "vae")
    factor, crop = downsampling_factor(vae), dataset.recipe.crop.size
    if crop % factor:
        raise UsageError(
            f"the HR images in {dataset.uri} have {crop} px a side, and the VAE of {base.name} takes multiples of "
            f"{factor}: make shards with such a crop.size"
        )
    latents = LatentsSource(
        dataset=dataset.digest,
        uri=relative_place(dataset.uri, storage.uri),
        vae=part_digest(base.path / "vae"),
        learner=learner.digest if learner else None,
        precision=precision,
        factor=factor,
        channels=int(vae.config["latent_channels"]),
    )
    hr = dataset.hr_dataset().storage
    work = FromPixels(latents, dataset.storage, index_of(dataset), hr, base, learner, dataset.scale, batch_size)
    return Job(derived_plans(dataset, work.name), work, storage, dataset.recipe, dataset, latents=latents)


class Pair(NamedTuple):
    """A sample as read: its row of the index, its members as stored, and their pixels."""

    row: Row
    lr_bytes: bytes
    info: bytes
    hr: np.ndarray
    lr: np.ndarray


@dataclass(frozen=True)
class FromPixels:
    """Shard work. `hr`: where the HR images lie; `index`: path of the `samples.parquet` of `pixels`."""

    source: LatentsSource
    pixels: Storage
    index: str
    hr: Storage
    base: Base
    learner: Learner | None
    scale: int
    batch_size: int
    device: str = "cpu"

    @property
    def name(self) -> str:
        """What is done to a shard; the batch size and the processor only change rounding."""
        return json.dumps(["latents", _VERSION, self.source.vae, self.source.learner, self.source.precision])

    @cached_property
    def _networks(self) -> tuple[Any, Any]:
        """VAE and learner, frozen, on the device. Raises DeeDSRError if this node has others than `source` names."""
        import torch

        from deedsr.adapter.adapter import channels_last, freeze
        from deedsr.learner.resnet import DegradationLearner

        device = usable_device(self.device)
        _require_same("base", self.base, part_digest(self.base.path / "vae"), self.source.vae)
        dtype = torch.bfloat16 if self.source.precision == "bf16" else torch.float32
        vae = channels_last(freeze(load_part(self.base.path, "vae", torch_dtype=dtype)), device)
        if self.learner is None:
            return vae, None
        _require_same("learner", self.learner, self.learner.digest, self.source.learner)
        learner = freeze(DegradationLearner.from_pretrained(self.learner.path, low_cpu_mem_usage=False))
        return vae, learner.to(device)

    def build(self, plan: ShardPlan, out: Storage, cpus: int = 1) -> ShardRecord:
        with shard_draft(plan, LATENTS_COLUMNS) as draft, ThreadPoolExecutor(1) as reader:
            samples = self._pairs(plan)
            batches = iter(lambda: tuple(islice(samples, self.batch_size)), ())
            ahead = reader.submit(next, batches, ())
            while pairs := ahead.result():
                ahead = reader.submit(next, batches, ())  # read and decoded while the networks work
                for pair, latents in zip(pairs, self._encoded(pairs), strict=True):
                    draft.add(self._draft(pair, latents), pair.row["source_uri"])
            return draft.commit(out)

    def _pairs(self, plan: ShardPlan) -> Iterator[Pair]:
        with ExitStack() as stack:
            lrs = stack.enter_context(Tars(self.pixels))
            hrs = lrs if self.hr.uri == self.pixels.uri else stack.enter_context(Tars(self.hr))
            for row in rows_of(plan.origin, self.pixels, self.index):
                lr = member_of(lrs, row, "lr")
                hr, pixels = (decode_member(data, row["key"], lrs.uri) for data in (member_of(hrs, row, "hr"), lr))
                yield Pair(row, lr, member_of(lrs, row, "json"), hr, pixels)

    def _draft(self, pair: Pair, latents: Latents) -> Draft:
        try:
            packed = pack(latents)
        except ValueError as error:
            raise DeeDSRError(f"the networks fail at sample {pair.row['key']}: {error}; try --precision fp32") from None
        kept = {"lr": pair.lr_bytes} if self.source.learner is None else {}
        row = {name: value for name, value in pair.row.items() if name not in PLACES}
        return Draft({"latents": packed, **kept, "json": pair.info}, row | {"latents_ext": LATENTS_EXTENSION})

    def _encoded(self, pairs: tuple[Pair, ...]) -> list[Latents]:
        """Means and deviations of HR and enlarged LR, and the vectors of the LR."""
        import torch

        from deedsr.sampling.autoencoder import latent_moments
        from deedsr.sampling.images import enlarge

        vae, learner = self._networks
        hr_BCHW, lr_BCHW = (
            torch.from_numpy(np.stack(images)).to(vae.device).permute(0, 3, 1, 2).float() / 255
            for images in ([pair.hr for pair in pairs], [pair.lr for pair in pairs])
        )
        with torch.inference_mode():
            moments: list[Sequence[np.ndarray | None]] = []
            for x_BCHW in (hr_BCHW, enlarge(lr_BCHW, self.scale)):
                for moment in latent_moments(vae, (2 * x_BCHW - 1).to(vae.dtype)):
                    moments.append([None] * len(pairs) if moment is None else [*moment.half().cpu().numpy()])
            vectors = [*learner(lr_BCHW).cpu().numpy()] if learner else [None] * len(pairs)
        return [Latents(*parts) for parts in zip(*moments, vectors, strict=True)]


def _require_same(part: str, network: Base | Learner, found: str, wanted: str | None) -> None:
    if found != wanted:
        raise DeeDSRError(f"the {part} {network.name} is another one on this node than where the command was given")
