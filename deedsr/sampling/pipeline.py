"""Sampling: from a degraded LR image to a picture enlarged by the model's scale (docs/method.md, 4).

Shape suffixes: B batch, C channels, H W pixels, h w latent pixels, D degradation vector.
"""

import inspect
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DConditionModel,
)

from deedsr.adapter.adapter import DegradationAwareAdapter
from deedsr.adapter.condition_encoder import PreparedDegradation
from deedsr.adapter.objective import clean_latent, model_output, pull_to_lr
from deedsr.errors import UsageError
from deedsr.hub.model_card import copy_base_licence, write_card
from deedsr.hub.model_folder import BASE_PARTS, TRAINED_PARTS, ModelFolder, find_folder, load_part
from deedsr.hub.settings import SamplingSettings
from deedsr.learner.resnet import DegradationLearner
from deedsr.sampling.autoencoder import (
    decode_in_tiles,
    decode_latents,
    downsampling_factor,
    encode_in_tiles,
    encode_latents,
)
from deedsr.sampling.color_fix import fix_color
from deedsr.sampling.gate import RestorationGate, blend
from deedsr.sampling.guidance import alpha_bar, guidance_strengths
from deedsr.sampling.images import OUTPUT_TYPES, Picture, enlarge_window, from_tensors, to_tensors
from deedsr.sampling.schedule import ddim, require_prediction, require_signal, solver_for, usable_eta
from deedsr.sampling.tiles import Mosaic, Window

BATCH_SIDE = 1024  # pixels of the output: tiles that are together as large as this square go through the UNet at once


class DeeDSRPipeline(DiffusionPipeline):
    """Degradation-aware real-world super-resolution.

    Args:
        vae: AutoencoderKL or AutoencoderTiny of the base.
        unet: frozen UNet of the base; the adapter is attached to it here.
        scheduler: any diffusers scheduler; noise guidance needs one with `alphas_cumprod`.
        learner: degradation learner.
        adapter: degradation-aware adapter made for this UNet.
        scale: enlargement factor that the adapter was trained for.
        sampling: what the model recommends, see `SamplingSettings`; what is left out is the paper's.
        lineage: where the model comes from, for its card; see `ModelFolder`.
        gate: calibrated share of the sampled picture in the result, see `RestorationGate`; None = all of it.
    """

    vae: AutoencoderKL | AutoencoderTiny
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    learner: DegradationLearner
    adapter: DegradationAwareAdapter
    _base_path: Path | None = None
    # For `enable_model_cpu_offload`: the order in which networks are first used. The adapter calls the UNet while it
    # computes, so it stays on the GPU.
    model_cpu_offload_seq = "learner->unet->vae"
    _exclude_from_cpu_offload = ["adapter"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        learner: DegradationLearner,
        adapter: DegradationAwareAdapter,
        scale: int = 4,
        sampling: Mapping[str, Any] | None = None,
        lineage: Mapping[str, Any] | None = None,
        gate: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, learner=learner, adapter=adapter)
        settings = SamplingSettings.of(sampling or {})
        calibrated = RestorationGate.of(gate, adapter.config["degradation_dim"]).as_dict() if gate else None
        self.register_to_config(scale=scale, sampling=settings.as_dict(), lineage=dict(lineage or {}), gate=calibrated)
        require_prediction(scheduler, adapter.config.get("prediction_type"))
        adapter.detach()
        adapter.attach(unet)

    @classmethod
    def from_pretrained(cls, model: str | Path, *, base: str | Path | None = None, **options: Any) -> "DeeDSRPipeline":
        """Load a model.

        Args:
            model: `tiny`, a folder written by `save_pretrained` or `deedsr train adapter`, or a hub id.
            base: base to use in place of the one that the model names.
            options: parts to use instead of the stored ones (`scheduler=...`); the rest goes to diffusers'
                `from_pretrained` of each network (`torch_dtype`, `low_cpu_mem_usage`).

        Raises UsageError where the model or its base is missing, incomplete, or incompatible with each other.
        """
        folder = ModelFolder.read(find_folder(model))
        base_path = folder.base_path(base)
        parts = {name: options.pop(name) for name in BASE_PARTS + TRAINED_PARTS if name in options}
        # A gate is calibrated on the model's own networks; `base_path` has compared the digests where one is recorded.
        own = (base is None or folder.base_digest is not None) and parts.keys() <= {"scheduler"}
        for name in BASE_PARTS + TRAINED_PARTS:
            if name in parts:
                continue
            part = load_part(folder.path if name in TRAINED_PARTS else base_path, name, **options)
            parts[name] = ddim(part) if name == "scheduler" and base_path != folder.path else part
        try:
            pipeline = cls(
                **parts, scale=folder.scale, sampling=folder.sampling.as_dict(), lineage=folder.lineage,
                gate=folder.gate if own else None,
            )  # fmt: skip
        except ValueError as error:
            raise UsageError(f"{folder.path} does not fit its base {base_path}: {error}") from error
        pipeline.register_to_config(_name_or_path=str(model))
        pipeline._base_path = base_path
        return pipeline

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """As diffusers' pipelines, with a model card and the licence."""
        super().save_pretrained(save_directory, *args, **options)
        write_card(Path(save_directory), scale=self.scale, sampling=self.sampling.as_dict(),
                   lineage=self.config["lineage"])  # fmt: skip
        if self._base_path:
            copy_base_licence(self._base_path, Path(save_directory))

    @property
    def scale(self) -> int:
        """Enlargement factor."""
        return self.config["scale"]

    @property
    def sampling(self) -> SamplingSettings:
        """Settings that the model recommends."""
        return SamplingSettings.of(self.config["sampling"])

    @torch.no_grad()
    def __call__(
        self,
        image: Picture | list[Picture],
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        **sampling: Any,
    ) -> ImagePipelineOutput:
        """Enlarge pictures.

        Args:
            image: one picture or several of any size: PIL images, uint8 arrays (H, W, 3), tensors (3, H, W) in [0, 1].
            generator: one for all, of which each picture gets its own copy, so that it comes out the same alone and
                among others; or one per picture. CPU generators give the same noise on every device.
            output_type: `pil`, `np` (floats in [0, 1]), `pt`, or `latent` (the decoder's input, with padding).
            sampling: settings of `SamplingSettings` by name, such as `num_inference_steps`; a setting that is missing
                or None is the model's (`self.sampling`).

        Returns:
            `images`, one per input, `scale` times as large.
        """
        settings = self.sampling.override(**sampling)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")

        # 1. Pictures of one size are sampled together.
        lrs = to_tensors(image)
        generators = _one_per_picture(generator, len(lrs))
        by_size: dict[torch.Size, list[int]] = defaultdict(list)
        for number, lr in enumerate(lrs):
            by_size[lr.shape].append(number)

        pictures: dict[int, torch.Tensor] = {}
        for members in by_size.values():
            lr_BCHW = torch.stack([lrs[number] for number in members]).to(self._execution_device)
            some = [generators[number] for number in members]
            sr_BCHW = self._super_resolve(lr_BCHW, some, settings, decode=output_type != "latent")
            pictures.update(zip(members, sr_BCHW, strict=True))

        if isinstance(generator, torch.Generator):
            generator.set_state(generators[0].get_state())  # a second call with it draws something new, as in diffusers
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=from_tensors([pictures[n] for n in range(len(lrs))], output_type))

    def _super_resolve(
        self, lr_BCHW: torch.Tensor, generators: list[torch.Generator], settings: SamplingSettings, *, decode: bool
    ) -> torch.Tensor:
        """LR in [0, 1] to pictures (B, 3, scale H, scale W) in [0, 1], or to their latents; float32."""
        height, width = (self.scale * side for side in lr_BCHW.shape[2:])
        factor, multiple = downsampling_factor(self.vae), self._latent_pixels_per_unit()
        # Padded to whole positions of the UNet's deepest level.
        rows, columns = (-(-side // (factor * multiple)) * multiple for side in (height, width))
        mosaic = Mosaic(rows, columns, self._tile_side(settings.tile), multiple)
        latent_shape = (self.unet.config["in_channels"], rows, columns)

        # 2. The degradation, from the LR as it is; once, it does not depend on the step.
        vectors_BVD = self._vectors(lr_BCHW, mosaic if settings.degradation_per_tile else None)
        with self._mixed_precision():
            degradation = self.adapter.condition_encoder.prepare(vectors_BVD.flatten(0, 1))

        # 3. The LR latent, of the enlarged picture.
        z_lr_BChw = self._encode(lr_BCHW, self._noise(latent_shape, generators), mosaic)

        # 4. From noise to a clean latent, kept in float32 at any precision of the networks.
        require_prediction(self.scheduler, self.adapter.config.get("prediction_type"))
        scheduler = solver_for(settings.solver, self.scheduler, settings.eta)
        scheduler.set_timesteps(settings.num_inference_steps)  # on the CPU, where schedulers compare them
        require_signal(scheduler)
        x_BChw = self._noise(latent_shape, generators) * (scheduler.init_noise_sigma * settings.temperature)
        x_BChw = self._denoise(scheduler, x_BChw, z_lr_BChw, degradation, mosaic, generators, settings)
        if not decode:
            return x_BChw

        # 5. Back to pixels, cropped, colour-corrected and blended with the bicubic enlargement by the gate.
        picture_BCHW = self._decode(x_BChw, height, width, mosaic)
        enlarged_rows = lambda part: enlarge_window(lr_BCHW, self.scale, Window(part.start, part.stop, 0, width))
        fix_color(settings.color_fix, picture_BCHW, enlarged_rows)
        picture_BCHW.clamp_(0, 1)
        shares_B = self._shares(vectors_BVD, settings)
        if shares_B is not None:
            blend(picture_BCHW, enlarged_rows, shares_B, self.scale)
        return picture_BCHW

    def _latent_pixels_per_unit(self) -> int:
        """Latent pixels a side under one position of the UNet's deepest level."""
        return 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    def _tile_side(self, pixels: int) -> int | None:
        """Side of a tile in latent pixels, None where there are no tiles."""
        unit = downsampling_factor(self.vae) * self._latent_pixels_per_unit()
        if 0 < pixels < 2 * unit:
            raise UsageError(f"tile must be {2 * unit} pixels or more for this model, or 0 for none, got {pixels}")
        return pixels // unit * self._latent_pixels_per_unit() or None

    def _vectors(self, lr_BCHW: torch.Tensor, mosaic: Mosaic | None) -> torch.Tensor:
        """Degradation vectors (B, V, D): one per picture, or one per tile of each picture."""
        windows = [lr_BCHW] if mosaic is None else [self._lr_under(window, lr_BCHW) for window in mosaic.windows]
        return torch.stack([self.learner(lr.to(self.learner.dtype)).to(self.unet.dtype) for lr in windows], 1)

    def _shares(self, vectors_BVD: torch.Tensor, settings: SamplingSettings) -> torch.Tensor | None:
        """Share of the sampled picture in each result (B,); None = all of it."""
        if settings.restoration is not None:
            whole = settings.restoration == 1
            return None if whole else vectors_BVD.new_full((len(vectors_BVD),), settings.restoration).float()
        gate = self.config["gate"]
        return RestorationGate.of(gate).shares(vectors_BVD) if gate else None

    def _lr_under(self, window: Window, lr_BCHW: torch.Tensor) -> torch.Tensor:
        """The LR pixels of a window of the latent, without padding."""
        top, bottom, left, right = window.scaled(downsampling_factor(self.vae))
        return lr_BCHW[:, :, top // self.scale : -(-bottom // self.scale), left // self.scale : -(-right // self.scale)]

    def _encode(self, lr_BCHW: torch.Tensor, noise_BChw: torch.Tensor, mosaic: Mosaic) -> torch.Tensor:
        """Latent (B, C, h, w), float32, of the enlarged picture, mirrored where it is padded."""

        def pixels(lr: torch.Tensor, window: Window) -> torch.Tensor:
            return (2 * enlarge_window(lr, self.scale, window) - 1).to(self.vae.dtype)

        if len(mosaic) == 1:
            whole = mosaic.windows[0].scaled(downsampling_factor(self.vae))
            return encode_latents(self.vae, pixels(lr_BCHW, whole), noise_BChw).float()
        latents = [
            encode_in_tiles(self.vae, partial(pixels, lr), noise, mosaic.side)
            for lr, noise in zip(lr_BCHW.split(1), noise_BChw.split(1), strict=True)
        ]
        return torch.cat(latents)

    def _decode(self, z_BChw: torch.Tensor, height: int, width: int, mosaic: Mosaic) -> torch.Tensor:
        """Pictures (B, 3, height, width), float32, nominally in [0, 1]; what was padded is cut off."""
        z_BChw = z_BChw.to(self.vae.dtype)
        if len(mosaic) == 1:
            return (decode_latents(self.vae, z_BChw).float() / 2 + 0.5)[:, :, :height, :width]
        picture_BCHW = torch.empty(len(z_BChw), 3, height, width, device=z_BChw.device)
        for picture, z in zip(picture_BCHW.split(1), z_BChw.split(1), strict=True):
            for window, piece in decode_in_tiles(self.vae, z, mosaic.side):
                inside = window.grown(0, height, width)
                inside.of(picture).copy_(inside.within(window).of(piece).float() / 2 + 0.5)
        return picture_BCHW

    def _denoise(
        self,
        scheduler: SchedulerMixin,
        x_BChw: torch.Tensor,
        z_lr_BChw: torch.Tensor,
        degradation: PreparedDegradation,
        mosaic: Mosaic,
        generators: list[torch.Generator],
        settings: SamplingSettings,
    ) -> torch.Tensor:
        prediction = scheduler.config.get("prediction_type", "epsilon")
        accepted = inspect.signature(scheduler.step).parameters
        step_options = {"eta": usable_eta(scheduler, settings.eta), "generator": generators}
        step_options = {name: value for name, value in step_options.items() if name in accepted}

        timesteps = scheduler.timesteps
        placed = timesteps.to(x_BChw.device)  # once: the host waits for the GPU at each copy
        strengths = guidance_strengths(settings.noise_guidance, settings.noise_guidance_share, len(timesteps))
        before = strengths[0]
        for t, t_placed, strength in zip(self.progress_bar(timesteps), placed, strengths, strict=True):
            if strength != before and hasattr(scheduler, "lower_order_nums"):
                scheduler.lower_order_nums = 0  # restart a multistep solver where guidance ends
            before = strength
            x_t = scheduler.scale_model_input(x_BChw, t)
            x_0, output = z_lr_BChw, None
            if strength < 1:  # at 1 the UNet's output would be replaced
                with self._mixed_precision():
                    output = self._predict(x_t, t_placed, z_lr_BChw, degradation, mosaic)
            if strength > 0:
                abar = alpha_bar(scheduler, t)
                if output is not None:
                    x_0 = clean_latent(output, x_t, abar, prediction)
                    x_0 = x_0 + pull_to_lr(x_0, z_lr_BChw, strength)
                output = model_output(x_0, x_t, abar, prediction)
            x_BChw = scheduler.step(output, t, x_BChw, **step_options).prev_sample
        return x_BChw

    def _mixed_precision(self) -> torch.autocast:
        """Autocast where the adapter's weights have a higher precision than the base's, as in training."""
        dtype = self.unet.dtype
        return torch.autocast(self._execution_device.type, dtype, enabled=self.adapter.dtype != dtype)

    def _predict(
        self,
        x_t_BChw: torch.Tensor,
        t: torch.Tensor,
        z_lr_BChw: torch.Tensor,
        degradation: PreparedDegradation,
        mosaic: Mosaic,
    ) -> torch.Tensor:
        """The UNet's output (B, C, h, w), float32. Tiles are blended before the scheduler's step."""
        dtype = self.unet.dtype
        if len(mosaic) == 1:
            return self.adapter(x_t_BChw.to(dtype), t, z_lr_BChw.to(dtype), degradation).float()
        tiles = [(picture, number) for picture in range(len(x_t_BChw)) for number in range(len(mosaic))]
        together = max(1, (BATCH_SIDE // downsampling_factor(self.vae)) ** 2 // mosaic.windows[0].area)
        output_BChw = torch.zeros_like(x_t_BChw)
        for first in range(0, len(tiles), together):
            some = tiles[first : first + together]
            x_t, z_lr = (
                torch.stack([mosaic.windows[number].of(whole[picture]) for picture, number in some]).to(dtype)
                for whole in (x_t_BChw, z_lr_BChw)
            )
            per_picture = degradation.samples // len(x_t_BChw)  # vectors: one, or one per tile
            vectors = [picture * per_picture + min(number, per_picture - 1) for picture, number in some]
            outputs = self.adapter(x_t, t, z_lr, degradation.of(torch.tensor(vectors, device=x_t.device)))
            for (picture, number), output in zip(some, outputs.float(), strict=True):
                mosaic.add(output_BChw[picture], number, output)
        return output_BChw

    def _noise(self, shape: tuple[int, ...], generators: list[torch.Generator]) -> torch.Tensor:
        """Standard normal (B, *shape), drawn picture by picture where its generator lives."""
        noise = [torch.randn(shape, generator=generator, device=generator.device) for generator in generators]
        return torch.stack(noise).to(self._execution_device)


def _one_per_picture(generator: torch.Generator | list[torch.Generator] | None, count: int) -> list[torch.Generator]:
    if isinstance(generator, list | tuple):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} pictures")
        return list(generator)
    if generator is None:  # follows torch.manual_seed, as everything of torch does
        return [torch.Generator().manual_seed(int(torch.randint(2**62, ()))) for _ in range(count)]
    return [torch.Generator(generator.device).set_state(generator.get_state()) for _ in range(count)]
