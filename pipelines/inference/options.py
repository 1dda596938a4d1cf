"""Options of the commands that apply models."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipelines.placement import Device

UnitInterval = Annotated[float, Field(ge=0, le=1)]


@dataclasses.dataclass(kw_only=True)
class SamplingOptions:
    """Which model samples, where and how; null = the default that is stored with the model."""

    base: Annotated[str | None, "folder, URI or hub id of the model's base; null = as recorded in the model"] = None
    device: Annotated[Device, "auto = CUDA if there is a GPU; cluster: cuda"] = "auto"
    steps: Annotated[PositiveInt | None, "sampling steps; null = the model's default, paper: 50"] = None
    noise_guidance: Annotated[UnitInterval | None, "strength; 0 = off; null = the model's default, paper: 1"] = None
    noise_guidance_share: Annotated[UnitInterval | None, "fraction of guided steps; 0 = first step only"] = None
    temperature: Annotated[UnitInterval | None, "of the first noise; 0 = none, with eta 0: no seed matters"] = None
    eta: Annotated[UnitInterval | None, "0 = deterministic (DDIM), 1 = new noise in every step"] = None
    color_fix: Annotated[Literal["none", "adain", "wavelet"] | None, "colour correction to the input"] = None
    solver: Annotated[Literal["ddim", "dpm"] | None, "dpm: second-order solver for about 15 steps"] = None
    tile: Annotated[NonNegativeInt | None, "output pixels per side of a tile; 0 = no tiling"] = None
    degradation_per_tile: Annotated[bool | None, "one degradation vector per tile, for collages"] = None
    restoration: Annotated[UnitInterval | None, "weight of the model's output; the rest is bicubic"] = None
    seed: Annotated[NonNegativeInt, "seed of the sampling noise"] = 0

    def sampling(self) -> dict[str, Any]:
        """Those that a model has defaults for, under their names in `deedsr.hub.settings.SamplingSettings`."""
        names = {field.name for field in dataclasses.fields(SamplingOptions)} - {"base", "device", "seed", "steps"}
        return {"num_inference_steps": self.steps} | {name: getattr(self, name) for name in sorted(names)}


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions(SamplingOptions):
    out: Annotated[str, "output: folder or s3://bucket/prefix"]
    model: Annotated[str | None, "what `train adapter` wrote: folder, URI or models:/NAME/VERSION; or tiny"] = None
    data: Annotated[str | None, "degradation shards, or a folder of LR pictures"] = None
    reference: Annotated[str | None, "folder of HR pictures; null = metrics without reference, or the shards' HR"] = (
        None
    )
    pictures: Annotated[list[str], "NAME=FOLDER or FOLDER with enlarged pictures, any number of them"] = (
        dataclasses.field(default_factory=list)
    )
    metrics: Annotated[str | None, "comma-separated names, listed below; null = psnr,ssim,niqe,niqe_set"] = None
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "of the model's networks"] = "fp32"
    metric_weights: Annotated[str | None, "folder with weights of lpips, dists, fid; null = torch's cache"] = None
    border: Annotated[NonNegativeInt, "pixels per side that psnr and ssim leave out; 0 for published figures"] = 0
    split: Annotated[Literal["validation", "train"], "split of the dataset"] = "validation"
    limit: Annotated[PositiveInt | None, "maximum number of pictures, evenly spread; null = all"] = None
    experiment: Annotated[str, "MLflow experiment"] = "deedsr-evaluation"

    def metric_names(self) -> list[str] | None:
        if self.metrics is None:
            return None
        return [name.strip() for name in self.metrics.split(",") if name.strip()]


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
