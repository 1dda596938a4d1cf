"""Stage 2: the degradation-aware adapter around a frozen diffusion model."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import deedsr
from deedsr.adapter.adapter import DegradationAwareAdapter, channels_last, freeze
from deedsr.adapter.objective import clean_latent, denoising_loss, noisy_and_target, picture_loss
from deedsr.dataset.keys import generator
from deedsr.dataset.manifest import LatentsSource
from deedsr.hub.model_card import copy_base_licence, write_card
from deedsr.hub.model_folder import FORMAT_VERSION, ModelFolder, load_part
from deedsr.hub.settings import SamplingSettings
from deedsr.learner.resnet import DegradationLearner
from deedsr.sampling.autoencoder import decode_latents, downsampling_factor, encode_latents
from deedsr.sampling.images import enlarge
from deedsr.sampling.schedule import ddim
from pipelines.data.dataset import Dataset
from pipelines.models import Adapter, Base, Learner
from pipelines.training.config import AdapterOptions
from pipelines.training.metrics import by_timestep, middles
from pipelines.training.schedules import PRESETS
from pipelines.training.stage import Stage, Weights, compile_blocks, initial_weights, save_model, unit

if TYPE_CHECKING:
    from deedsr.sampling.pipeline import DeeDSRPipeline


class Draws(NamedTuple):
    """Random draws of one sample: `place` of the crop (top, left, height, width in LR pixels), the noise that samples
    the VAE's posteriors of LR and HR (2, C, h, w), and inputs of the denoiser."""

    place: tuple[int, int, int, int]
    encoding_noise: np.ndarray
    inputs: dict[str, Any]


class AdapterBatch(TypedDict):
    """A micro-batch: of pixels, or of latents that were stored."""

    timestep: Tensor  # (B,)
    noise: Tensor  # (B, C, h, w)
    guidance: Tensor  # (B,) strength of the pull to the LR
    lr: NotRequired[Tensor]  # (B, 3, H, W) uint8, whole, for the learner
    lr_crop: NotRequired[Tensor]  # (B, 3, H, W) uint8
    hr_crop: NotRequired[Tensor]  # (B, 3, s H, s W) uint8
    encoding_noise: NotRequired[Tensor]  # (B, 2, C, h, w) of the posteriors of LR and HR
    z_lr: NotRequired[Tensor]  # (B, C, h, w)
    z_hr: NotRequired[Tensor]  # (B, C, h, w)
    degradation: NotRequired[Tensor]  # (B, D)


class AdapterStage(Stage):
    def __init__(self, options: AdapterOptions, scale: int, latents: LatentsSource | None = None):
        """`latents`: the dataset holds latents made of these; then neither VAE nor learner is loaded to train."""
        self.options, self.scale, self.latents = options, scale, latents
        self.base, self.trained_learner = Base(options.base), Learner(options.learner)
        self.init = Adapter(options.init) if options.init else None
        self.models = [self.base, self.trained_learner, *([self.init] if self.init else [])]

    @cached_property
    def sampling(self) -> dict[str, Any]:
        """Settings that the model recommends: those given, over the initial model's.

        A preset's are for new weights: beside an initial model they do not count.
        """
        given, folder = self.options.sampling, self.init.path.parent if self.init else None
        if folder is None or not any((folder / name).is_file() for name in ("model_index.json", "deedsr.json")):
            return given  # new weights, or an adapter's alone
        of_preset = PRESETS["adapter"][self.options.model.preset].get("sampling", {})
        recommended = ModelFolder.read(folder).sampling.as_dict()
        own = {name: value for name, value in recommended.items() if value != getattr(SamplingSettings(), name)}
        return own | {name: value for name, value in given.items() if of_preset.get(name) != value}

    @property
    def temperature(self) -> float:
        """Of the noise in training: where pictures are compared, that of the recommended sampling."""
        return self.sampling.get("temperature", 1.0) if self.options.diffusion.pictures else 1.0

    def network(self, unet: UNet2DConditionModel | None = None, **more: Any) -> DegradationAwareAdapter:
        """The adapter of `unet`, or of one with the base's geometry."""
        model = self.options.model
        unet = unet or UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(self.base.path, subfolder="unet")
        )
        dim = DegradationLearner.load_config(self.trained_learner.path)["widths"][-1]
        return DegradationAwareAdapter.for_unet(unet, model.preset, dim, model.tokens, model.ablate, **more)

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        base = self.base.path
        self.unet = channels_last(freeze(load_part(base, "unet", torch_dtype=dtype)), device)
        if self.latents is None:
            self.vae = channels_last(freeze(load_part(base, "vae", torch_dtype=dtype)), device)
            self.vae_factor = downsampling_factor(self.vae)
        else:
            self.vae_factor = self.latents.factor
        if self.latents is None or self.latents.learner is None:
            # The learner stays in fp32: its vectors are computed once per image, and its statistics do not fit bf16.
            learner = DegradationLearner.from_pretrained(self.trained_learner.path, low_cpu_mem_usage=False)
            self.learner = freeze(learner).to(device)
        self.scheduler = ddim(load_part(base, "scheduler"))
        torch.manual_seed(self.options.train.seed)
        self.adapter = self.network(self.unet, prediction_type=self.scheduler.config["prediction_type"])
        self.adapter.initialize_from(self.unet)
        if self.init:
            self.adapter.load_state_dict(initial_weights(self.init, self.adapter))
        self.adapter.to(device).attach(self.unet)
        if self.options.train.gradient_checkpointing:
            for network in (self.unet, self.adapter):
                network.enable_gradient_checkpointing()
        if self.options.train.compile:
            compile_blocks(self.adapter.blocks())
        self.latent_channels = int(self.unet.config["in_channels"])
        self.timesteps = self.options.diffusion.timesteps(self.scheduler.config["num_train_timesteps"])
        return self.adapter

    def sample(self, dataset: Dataset, index: pa.Table, row: int, epoch: int) -> dict[str, Any]:
        """The whole LR for the learner; an aligned LR/HR crop, a timestep and the noise for the denoiser. Of latents:
        the vector, and crops of the latents at the nearest latent pixels."""
        if self.latents is not None:
            return self._sample_latents(dataset, index, row, epoch)
        sample = dataset.read(index, row)
        height, width = sample.lr.shape[:2]
        draws = self._draw(sample.key, epoch, height, width)
        top, left, rows, columns = draws.place
        lr = sample.lr[top : top + rows, left : left + columns]
        s = self.scale
        hr = sample.hr[s * top : s * (top + rows), s * left : s * (left + columns)]
        planes = {"lr": _planes(sample.lr), "lr_crop": _planes(lr), "hr_crop": _planes(hr)}
        return {**planes, "encoding_noise": draws.encoding_noise, **draws.inputs}

    def _sample_latents(self, dataset: Dataset, index: pa.Table, row: int, epoch: int) -> dict[str, Any]:
        key, stored, lr = dataset.read_latents(index, row)
        height, width = (side * self.vae_factor // self.scale for side in stored.hr_mean.shape[1:])
        draws = self._draw(key, epoch, height, width)
        rows, columns = draws.encoding_noise.shape[2:]
        top, left = (self.scale * start // self.vae_factor for start in draws.place[:2])
        crop = np.s_[:, top : top + rows, left : left + columns]
        moments = ((stored.lr_mean, stored.lr_std), (stored.hr_mean, stored.hr_std))
        z_lr, z_hr = (
            mean[crop].astype(np.float32) + (0 if std is None else std[crop] * noise)
            for (mean, std), noise in zip(moments, draws.encoding_noise, strict=True)
        )
        known = {"degradation": stored.degradation} if lr is None else {"lr": _planes(lr)}
        return {"z_lr": z_lr, "z_hr": z_hr, **known, **draws.inputs}

    def _draw(self, key: str, epoch: int, height: int, width: int) -> "Draws":
        """`height`, `width`: of the LR."""
        options = self.options
        rng = generator("diffusion", options.train.seed, epoch, key)
        side = options.diffusion.lr_crop
        rows, columns = (min(side, height), min(side, width)) if side else (height, width)
        top, left = (int(rng.integers(have - use + 1)) for have, use in ((height, rows), (width, columns)))
        s = self.scale
        latent = (self.latent_channels, s * rows // self.vae_factor, s * columns // self.vae_factor)
        inputs = {
            "timestep": np.int64(self.timesteps * rng.random() ** options.diffusion.timestep_power),
            "noise": rng.standard_normal(latent, dtype=np.float32),
        }
        encoding_noise = rng.standard_normal((2, *latent), dtype=np.float32)
        inputs["guidance"] = np.float32(options.diffusion.noise_guidance * min(1, 2 * rng.random()))
        return Draws((top, left, rows, columns), encoding_noise, inputs)

    def _encoded(self, batch: AdapterBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of LR and HR, and the degradation vectors, all fp32: computed, or as they were stored."""
        vector_BD = batch["degradation"] if "degradation" in batch else self.learner(unit(batch["lr"]))
        if "z_lr" in batch:
            return batch["z_lr"].float(), batch["z_hr"].float(), vector_BD.float()
        images = enlarge(unit(batch["lr_crop"]), self.scale), unit(batch["hr_crop"])
        z_lr, z_hr = (
            encode_latents(self.vae, (2 * image - 1).to(self.vae.dtype), batch["encoding_noise"][:, i]).float()
            for i, image in enumerate(images)
        )
        return z_lr, z_hr, vector_BD

    def loss(self, model: Callable[..., Tensor], batch: AdapterBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss_B = self.losses(model, batch)
        return loss_B.mean(), by_timestep(loss_B.detach(), batch["timestep"], self.timesteps)

    def losses(self, model: Callable[..., Tensor], batch: AdapterBatch) -> Tensor:
        """The loss of each sample (B,), in fp32 whatever the networks compute in."""
        with torch.no_grad():
            z_lr, z_hr, degradation_BD = self._encoded(batch)
            t, prediction = batch["timestep"], self.scheduler.config["prediction_type"]
            abar_B = self.scheduler.alphas_cumprod.to(t.device)[t]
            noise = batch["noise"] * self.temperature
            noisy, target = noisy_and_target(z_hr, z_lr, noise, abar_B, batch["guidance"], prediction)
        output = model(noisy, t, z_lr, degradation_BD)
        if self.options.diffusion.pictures:
            x_0 = clean_latent(output.float(), noisy, abar_B.view(-1, 1, 1, 1), prediction)
            picture_BCHW = decode_latents(self.vae, x_0.to(self.vae.dtype))
            return picture_loss(picture_BCHW, 2 * unit(batch["hr_crop"]) - 1)
        return denoising_loss(output, target, abar_B, prediction, self.options.diffusion.snr_gamma)

    def validation_step(self, model: Callable[..., Tensor], batch: AdapterBatch) -> Tensor:
        """The loss of each sample at the middle of each bucket of timesteps, with the sample's one noise."""
        at = [batch | {"timestep": torch.full_like(batch["timestep"], t)} for t in middles(self.timesteps)]
        return torch.stack([self.losses(model, one) for one in at], 1)

    def validation_metrics(self, rows_SN: Tensor) -> dict[str, Tensor]:
        means_N = rows_SN.mean(0)
        by_timestep = {f"loss_timestep/{t:03d}": mean for t, mean in zip(middles(self.timesteps), means_N, strict=True)}
        return {"loss": means_N.mean()} | by_timestep

    def pipeline(self) -> "DeeDSRPipeline | None":
        if self.latents is not None:  # neither pixels nor what would make some
            return None
        from deedsr.sampling.pipeline import DeeDSRPipeline

        # A scheduler of its own: sampling sets the timesteps of the one it has.
        scheduler = copy.deepcopy(self.scheduler)
        parts = (self.vae, self.unet, scheduler, self.learner, self.adapter)
        pipeline = DeeDSRPipeline(*parts, scale=self.scale, sampling=self.sampling)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def export(self, folder: Path, trained: Weights, state: Weights, history: dict[str, Any] | None = None) -> None:
        learner = DegradationLearner.from_pretrained(self.trained_learner.path, low_cpu_mem_usage=False)
        save_model(self.adapter, trained, folder / "adapter")
        save_model(learner, learner.state_dict(), folder / "learner")
        training = (history or {}) | {
            "learner": self.trained_learner.digest,
            "prediction_type": self.scheduler.config["prediction_type"],
            "configuration": {part: asdict(getattr(self.options, part)) for part in ("model", "diffusion", "train")},
            "created_by": f"deedsr {deedsr.__version__}",
        }
        lineage = {"base": self.options.base, "license": self.options.license, "training": training}
        made = {"scale": self.scale, "sampling": self.sampling, **lineage, "base_digest": self.base.digest}
        (folder / "deedsr.json").write_text(json.dumps({"format_version": FORMAT_VERSION, **made}, indent=2))
        write_card(folder, scale=self.scale, sampling=self.sampling, lineage=lineage)
        copy_base_licence(self.base.path, folder)


def _planes(image: np.ndarray) -> np.ndarray:
    """HWC to CHW."""
    return np.ascontiguousarray(image.transpose(2, 0, 1))
