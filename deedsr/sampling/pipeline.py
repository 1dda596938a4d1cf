"""Sampling: from a degraded LR image to a picture of the model's scale (paper, 4).

Shape suffixes: B batch, C channels, H W pixels, h w latent cells, D degradation vector.
"""

import inspect
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from deedsr.adapter.adapter import DegradationAwareAdapter
from deedsr.errors import UsageError
from deedsr.learner.resnet import DegradationLearner
from deedsr.sampling.color_fix import fix_color
from deedsr.sampling.guidance import alpha_bar, clean_latent, guidance_strengths, model_output
from deedsr.sampling.images import OUTPUT_TYPES, Picture, from_tensors, pad_reflect, to_tensors
from deedsr.sampling.latents import decode_latents, downsampling_factor, encode_latents, enlarge
from deedsr.sampling.model_card import copy_base_licence, write_card
from deedsr.sampling.model_folder import (
    BASE_PARTS,
    TRAINED_PARTS,
    ModelFolder,
    find_base,
    find_folder,
    load_part,
)
from deedsr.sampling.schedule import ddim, require_prediction, require_signal, usable_eta
from deedsr.sampling.settings import SamplingSettings

SMALLEST_LEARNER_INPUT = 3  # pixels a side: the learner's high-pass filter mirrors two


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
    """

    vae: Any
    unet: Any
    scheduler: Any
    learner: DegradationLearner
    adapter: DegradationAwareAdapter
    _base_path: Path | None = None

    def __init__(
        self,
        vae: Any,
        unet: Any,
        scheduler: Any,
        learner: DegradationLearner,
        adapter: DegradationAwareAdapter,
        scale: int = 4,
        sampling: Mapping[str, Any] | None = None,
        lineage: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, learner=learner, adapter=adapter)
        settings = SamplingSettings.of(sampling or {})
        self.register_to_config(scale=scale, sampling=settings.as_dict(), lineage=dict(lineage or {}))
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

        Raises UsageError where the model or its base is missing, incomplete, or made for one another's likes.
        """
        folder = ModelFolder.read(find_folder(model))
        base_path = folder.base_path() if base is None else find_base(base)
        parts = {name: options.pop(name) for name in BASE_PARTS + TRAINED_PARTS if name in options}
        for name in BASE_PARTS + TRAINED_PARTS:
            if name in parts:
                continue
            part = load_part(folder.path if name in TRAINED_PARTS else base_path, name, **options)
            parts[name] = ddim(part) if name == "scheduler" and base_path != folder.path else part
        try:
            pipeline = cls(**parts, scale=folder.scale, sampling=folder.sampling.as_dict(), lineage=folder.lineage)
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
        """What the model recommends."""
        return SamplingSettings.of(self.config["sampling"])

    @torch.no_grad()
    def __call__(
        self,
        image: Picture | list[Picture],
        num_inference_steps: int | None = None,
        noise_guidance: float | None = None,
        noise_guidance_share: float | None = None,
        eta: float | None = None,
        color_fix: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Enlarge pictures; whatever is None is as the model recommends (`sampling`).

        Args:
            image: one picture or several of any size: PIL images, uint8 arrays (H, W, 3), tensors (3, H, W) in [0, 1].
            num_inference_steps: sampling steps.
            noise_guidance: strength by which the predicted clean latent is pulled to the LR latent in the first steps,
                0 (off) to 1 (replaced: those steps need no UNet).
            noise_guidance_share: share of the steps that are guided, from the first on; 0 = the first step only.
            eta: fresh noise per step, 0 to 1, for schedulers that know it.
            color_fix: `none`, `adain` or `wavelet`.
            generator: one for all, of which each picture gets its own copy, so that it comes out the same alone and
                among others; or one per picture. CPU generators give the same noise on every device.
            output_type: `pil`, `np` (floats in [0, 1]) or `pt`.

        Returns:
            `images`, one per input, `scale` times as large.
        """
        settings = self.sampling.override(
            num_inference_steps=num_inference_steps,
            noise_guidance=noise_guidance,
            noise_guidance_share=noise_guidance_share,
            eta=eta,
            color_fix=color_fix,
        )
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
            sr_BCHW = self._super_resolve(lr_BCHW, [generators[number] for number in members], settings)
            pictures.update(zip(members, sr_BCHW, strict=True))

        if isinstance(generator, torch.Generator):
            generator.set_state(generators[0].get_state())  # a second call with it draws something new, as in diffusers
        return ImagePipelineOutput(images=from_tensors([pictures[n] for n in range(len(lrs))], output_type))

    def _super_resolve(
        self, lr_BCHW: torch.Tensor, generators: list[torch.Generator], settings: SamplingSettings
    ) -> torch.Tensor:
        """LR in [0, 1] to pictures (B, 3, scale H, scale W) in [0, 1], float32."""
        dtype = self.unet.dtype
        height, width = lr_BCHW.shape[2:]

        # 2. The degradation, from the LR as it is; once, it does not depend on the step.
        learner_input = pad_reflect(lr_BCHW, *(max(side, SMALLEST_LEARNER_INPUT) for side in (height, width)))
        degradation_BD = self.learner(learner_input.to(self.learner.dtype)).to(dtype)

        # 3. The LR latent, of the enlarged picture padded to whole cells of the UNet's deepest level.
        enlarged_BCHW = enlarge(lr_BCHW, self.scale)
        factor = downsampling_factor(self.vae)
        multiple = factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        padded = [-(-side // multiple) * multiple for side in enlarged_BCHW.shape[2:]]
        latent_shape = (self.unet.config["in_channels"], *(side // factor for side in padded))
        encoding_noise = self._noise(latent_shape, generators)
        vae_input = 2 * pad_reflect(enlarged_BCHW, *padded) - 1
        z_lr_BChw = encode_latents(self.vae, vae_input.to(self.vae.dtype), encoding_noise).float()

        # 4. From noise to a clean latent, kept in float32 whatever the networks compute in.
        self.scheduler.set_timesteps(settings.num_inference_steps, device=lr_BCHW.device)
        require_prediction(self.scheduler, self.adapter.config.get("prediction_type"))
        require_signal(self.scheduler)
        x_BChw = self._noise(latent_shape, generators) * self.scheduler.init_noise_sigma
        x_BChw = self._denoise(x_BChw, z_lr_BChw, degradation_BD, generators, settings)

        # 5. Back to pixels of the size asked for, in the LR's colours.
        decoded_BCHW = decode_latents(self.vae, x_BChw.to(self.vae.dtype)).float() / 2 + 0.5
        decoded_BCHW = decoded_BCHW[:, :, : self.scale * height, : self.scale * width]
        return fix_color(settings.color_fix, decoded_BCHW, enlarged_BCHW).clamp(0, 1)

    def _denoise(
        self,
        x_BChw: torch.Tensor,
        z_lr_BChw: torch.Tensor,
        degradation_BD: torch.Tensor,
        generators: list[torch.Generator],
        settings: SamplingSettings,
    ) -> torch.Tensor:
        dtype = self.unet.dtype
        prediction = self.scheduler.config.get("prediction_type", "epsilon")
        accepted = inspect.signature(self.scheduler.step).parameters
        step_options = {"eta": usable_eta(self.scheduler, settings.eta), "generator": generators}
        step_options = {name: value for name, value in step_options.items() if name in accepted}

        timesteps = self.scheduler.timesteps
        strengths = guidance_strengths(settings.noise_guidance, settings.noise_guidance_share, len(timesteps))
        for t, strength in zip(self.progress_bar(timesteps), strengths, strict=True):
            x_t = self.scheduler.scale_model_input(x_BChw, t)
            x_0, output = z_lr_BChw, None
            if strength < 1:  # else nothing of what the UNet says would be kept
                output = self.adapter(x_t.to(dtype), t, z_lr_BChw.to(dtype), degradation_BD).float()
            if strength > 0:
                abar = alpha_bar(self.scheduler, t)
                if output is not None:
                    x_0 = (1 - strength) * clean_latent(output, x_t, abar, prediction) + strength * z_lr_BChw
                output = model_output(x_0, x_t, abar, prediction)
            x_BChw = self.scheduler.step(output, t, x_BChw, **step_options).prev_sample
        return x_BChw

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
