"""Sampling of one picture by a model; in fp32 where half precision spoils it."""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from deedsr.errors import DeeDSRError
from pipelines.models import Model, Precision
from pipelines.placement import Device

if TYPE_CHECKING:
    import torch

    from deedsr.hub.settings import SamplingSettings
    from deedsr.sampling.pipeline import DeeDSRPipeline

logger = logging.getLogger(__name__)


class TooLarge(DeeDSRError):
    """A picture does not fit into the memory of this machine."""

    def __init__(self, rgb_CHW: "torch.Tensor"):
        height, width = rgb_CHW.shape[1:]
        super().__init__(f"not enough memory to enlarge {width}x{height} pixels: cut it into parts, or lower --tile")


@dataclass(frozen=True)
class Sampler:
    """Loads the model at first use. `device`: see `pipelines.models.usable_device`; `precision`: of its networks."""

    model: Model
    sampling: "SamplingSettings"
    device: Device
    precision: Precision

    @cached_property
    def pipeline(self) -> "DeeDSRPipeline":
        return self.model.load(self.device, self.precision)

    @cached_property
    def _fp32_pipeline(self) -> "DeeDSRPipeline":
        return self.model.load(self.device, "fp32")

    def __call__(self, rgb_CHW: "torch.Tensor", generator: "torch.Generator", name: str) -> "torch.Tensor":
        """float32 (3, scale H, scale W) of (3, H, W), in [0, 1]. `name` is for warnings."""
        import torch

        begin = generator.get_state()
        result = self._sampled(self.pipeline, rgb_CHW, generator)
        if self.pipeline.unet.dtype != torch.float32 and _is_spoilt(result, rgb_CHW):
            logger.warning("%s: black or not finite in half precision, made again in fp32", name)
            generator.set_state(begin)
            result = self._sampled(self._fp32_pipeline, rgb_CHW, generator)
        return result

    def _sampled(
        self, pipeline: "DeeDSRPipeline", rgb_CHW: "torch.Tensor", generator: "torch.Generator"
    ) -> "torch.Tensor":
        import torch

        try:
            result = pipeline(rgb_CHW, generator=generator, output_type="pt", **self.sampling.as_dict())
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise TooLarge(rgb_CHW) from error
        except RuntimeError as error:  # what torch raises when the CPU's memory is short
            if "not enough memory" in str(error) or "allocate memory" in str(error):
                raise TooLarge(rgb_CHW) from error
            raise
        return result.images[0].cpu()


def _is_spoilt(result: "torch.Tensor", rgb: "torch.Tensor") -> bool:
    """Whether half precision overflowed: a value is not finite, or all of it is black and the picture was not."""
    return not bool(result.isfinite().all()) or bool(result.max() < 1 / 255 < rgb.max())
