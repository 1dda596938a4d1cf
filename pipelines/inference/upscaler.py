"""The work on one picture: read, enlarge, encode, write, unless its result is there."""

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deedsr import __version__
from deedsr.errors import DeeDSRError
from pipelines.inference.pictures import (
    LOSSY,
    Picture,
    encode,
    exif_of_result,
    format_of,
    holds_deep,
    mark_of,
    read_picture,
    require_fit,
)
from pipelines.models import Model, Precision
from pipelines.placement import Device
from pipelines.storage import Storage
from pipelines.storage.errors import not_shared
from pipelines.storage.waiting import patiently

if TYPE_CHECKING:
    import torch

    from deedsr.hub.settings import SamplingSettings
    from deedsr.sampling.pipeline import DeeDSRPipeline

logger = logging.getLogger(__name__)


class Input(NamedTuple):
    """One picture to enlarge."""

    storage: Storage
    path: str  # in its storage
    target: str  # of its result, in the output's storage

    @property
    def uri(self) -> str:
        return f"{self.storage.uri.rstrip('/')}/{self.path}"


class TooLarge(DeeDSRError):
    """A picture does not fit into the memory of this machine."""

    def __init__(self, rgb_CHW: "torch.Tensor"):
        height, width = rgb_CHW.shape[1:]
        super().__init__(f"not enough memory to enlarge {width}x{height} pixels: cut it into parts, or lower --tile")


class Done(NamedTuple):
    """Result of one picture."""

    input: str  # URI
    output: str
    seconds: float  # without loading the model
    reused: bool = False
    reason: str = ""  # why there is no result


@dataclass(frozen=True)
class Upscaler:
    """Enlarges pictures into `out`. Pickles; each process loads the model when the first picture needs it."""

    model: Model
    sampling: "SamplingSettings"
    seed: int
    quality: int
    overwrite: bool
    out: Storage
    device: Device = "auto"  # see `pipelines.models.usable_device`
    precision: Precision = "auto"  # see `pipelines.models.Model.load`
    sentinel: str = ""  # a file that is in a local `out` meanwhile: a worker that does not see it has other disks

    def __call__(self, source: Input) -> Done:
        """Raises DeeDSRError for what would fail with every other picture as well: the model, a full disk."""
        began = time.monotonic()
        output = f"{self.out.uri.rstrip('/')}/{source.target}"
        done = lambda **more: Done(source.uri, output, round(time.monotonic() - began, 3), **more)
        format = format_of(source.target)
        if self.sentinel:
            self._require_shared(source)
        try:
            data = _read(source)
            mark = self._mark(data, format)
            if not self.overwrite and self._is_there(source.target, format, mark, output):
                return done(reused=True)
            picture = read_picture(data)
            require_fit(picture, format, self._scale)
        except DeeDSRError as error:
            return done(reason=str(error))
        waited = time.monotonic()
        _ = self._pipeline  # loaded before the clock of the first picture goes on
        began += time.monotonic() - waited
        try:
            enlarged = picture.enlarged(self._enlarge(picture, source.uri), deep=holds_deep(format) and picture.deep)
        except TooLarge as error:
            return done(reason=str(error))
        height, width = enlarged.pixels_HWC.shape[:2]
        file = encode(enlarged, exif_of_result(picture.exif, width, height, mark), format, self.quality)
        try:
            patiently(lambda: self.out.write(source.target, file))
        except DeeDSRError as error:
            self.out.require_writable(len(file))
            return done(reason=str(error))
        return done()

    def _require_shared(self, source: Input) -> None:
        """Raises UsageError on a worker whose disks are not those of the command."""
        for storage, path in ((self.out, self.sentinel), (source.storage, "")):
            place = storage.local_path(path)
            if place is not None and not place.exists():
                raise not_shared(storage.uri)

    def _mark(self, data: bytes, format: str) -> str:
        """What a result depends on, 32 hexadecimal digits; device and `auto` precision affect only rounding."""
        made_of = {
            "version": __version__,
            "model": self.model.digest,
            "sampling": self.sampling.as_dict(),
            "seed": self.seed,
            "format": format,
            "quality": self.quality if format in LOSSY else None,
            "input": hashlib.sha256(data).hexdigest(),
        }
        if self.precision != "auto":
            made_of["precision"] = self.precision
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]

    def _is_there(self, target: str, format: str, mark: str, output: str) -> bool:
        """Whether the result is there. Raises DeeDSRError if what is there is of another program."""
        try:
            with self.out.open(target) as file:
                found = mark_of(file, format)
        except FileNotFoundError:
            return False
        if found is None:
            raise DeeDSRError(f"{output} exists and is no result of this command: choose another --out, or --overwrite")
        return found == mark

    @cached_property
    def _scale(self) -> int:
        return self.model.description.scale

    @cached_property
    def _pipeline(self) -> "DeeDSRPipeline":
        return self.model.load(self.device, self.precision)

    @cached_property
    def _fp32_pipeline(self) -> "DeeDSRPipeline":
        return self.model.load(self.device, "fp32")

    def _enlarge(self, picture: Picture, name: str) -> np.ndarray:
        """float32 (3, scale H, scale W) in [0, 1]; anew in fp32 where half precision spoilt it."""
        import torch

        rgb = torch.from_numpy(picture.rgb())
        result = self._sampled(self._pipeline, rgb)
        if self._pipeline.unet.dtype != torch.float32 and _is_spoilt(result, rgb):
            logger.warning("%s: black or not finite in half precision, made again in fp32", name)
            result = self._sampled(self._fp32_pipeline, rgb)
        return result.numpy()

    def _sampled(self, pipeline: "DeeDSRPipeline", rgb: "torch.Tensor") -> "torch.Tensor":
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        try:
            result = pipeline(rgb, generator=generator, output_type="pt", **self.sampling.as_dict())
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise TooLarge(rgb) from error
        except RuntimeError as error:  # what torch raises when the CPU's memory is short
            if "not enough memory" in str(error) or "allocate memory" in str(error):
                raise TooLarge(rgb) from error
            raise
        return result.images[0].cpu()


def _is_spoilt(result: "torch.Tensor", rgb: "torch.Tensor") -> bool:
    """Whether half precision overflowed: a value is not finite, or all of it is black and the picture was not."""
    return not bool(result.isfinite().all()) or bool(result.max() < 1 / 255 < rgb.max())


def _read(source: Input) -> bytes:
    try:
        return source.storage.read(source.path)
    except FileNotFoundError:
        raise DeeDSRError("there is no such file: it is gone, or a pipe, or a link that leads nowhere") from None
