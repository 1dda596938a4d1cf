"""The work on one picture: read, enlarge, encode, write, unless its result is there."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypedDict, final

import cv2
import numpy as np

from deedsr import __version__
from deedsr.errors import DeeDSRError
from pipelines.inference.options import UpscaleOptions
from pipelines.inference.pictures import (
    LOSSY,
    Picture,
    encode,
    exif_of_result,
    format_of,
    mark_of,
    read_picture,
    require_fit,
)
from pipelines.inference.sampler import Sampler, TooLarge
from pipelines.models import Model
from pipelines.placement import Device
from pipelines.storage import Storage
from pipelines.storage.errors import not_shared
from pipelines.storage.waiting import patiently

if TYPE_CHECKING:
    from deedsr.hub.settings import SamplingSettings


class Input(NamedTuple):
    """One picture to enlarge."""

    storage: Storage
    path: str  # in its storage
    target: str  # of its result, in the output's storage

    @property
    def uri(self) -> str:
        return f"{self.storage.uri.rstrip('/')}/{self.path}"


class Resize(NamedTuple):
    """Size of a result that is not the model's factor: `factor` times the input's, or the largest inside of `box`
    (width, height) of its aspect ratio."""

    factor: float | None = None
    box: tuple[int, int] | None = None

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result."""
        factor = min(self.box[0] / width, self.box[1] / height) if self.box else self.factor or 1
        return max(round(height * factor), 1), max(round(width * factor), 1)


@final
class Upscaled(TypedDict):
    input: str  # URI
    output: str
    seconds: float  # without loading the model
    reused: bool


@final
class Failed(TypedDict):
    input: str  # URI
    reason: str  # why there is no result


@dataclass(frozen=True)
class Upscaler:
    """Enlarges pictures into `out`. Pickles; each process loads the model when the first picture needs it."""

    options: UpscaleOptions
    device: Device  # where this process computes, see `pipelines.models.usable_device`
    model: Model
    sampling: "SamplingSettings"
    out: Storage
    resize: Resize | None = None  # None: the model's factor
    sentinel: str = ""  # a temporary file in a local `out`: a worker that does not see it is on another machine's disk

    def __call__(self, source: Input) -> Upscaled | Failed:
        """Raises DeeDSRError for what would fail with every other picture as well: the model, a full disk."""
        began = time.monotonic()
        output = f"{self.out.uri.rstrip('/')}/{source.target}"
        done = lambda reused: Upscaled(
            input=source.uri, output=output, seconds=round(time.monotonic() - began, 3), reused=reused
        )
        failed = lambda error: Failed(input=source.uri, reason=str(error))
        format = format_of(source.target)
        if self.sentinel:
            self._require_shared(source)
        try:
            data = _read(source)
            mark = self._mark(data, format)
            if not self.options.overwrite and self._is_there(source.target, format, mark, output):
                return done(True)
            picture = read_picture(data)
            require_fit(picture, format, max(self._size(picture)))
        except DeeDSRError as error:
            return failed(error)
        waited = time.monotonic()
        _ = self._sampler.pipeline  # loaded before the clock of the first picture goes on
        began += time.monotonic() - waited
        try:
            enlarged = picture.enlarged(self._enlarge(picture, source.uri), deep=picture.deep and format == "png")
        except TooLarge as error:
            return failed(error)
        height, width = enlarged.pixels_HWC.shape[:2]
        file = encode(enlarged, exif_of_result(picture.exif, width, height, mark), format, self.options.quality)
        try:
            patiently(lambda: self.out.write(source.target, file))
        except DeeDSRError as error:
            self.out.require_writable(len(file))
            return failed(error)
        return done(False)

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
            "sampling": self.sampling.identity(),
            "seed": self.options.seed,
            "format": format,
            "quality": self.options.quality if format in LOSSY else None,
            "input": hashlib.sha256(data).hexdigest(),
        }
        if self.options.precision != "auto":
            made_of["precision"] = self.options.precision
        if self.resize:
            made_of["resize"] = self.resize
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

    def _size(self, picture: Picture) -> tuple[int, int]:
        """Height and width of the result."""
        return (self.resize or Resize(self.model.description.scale)).of(*picture.pixels_HWC.shape[:2])

    @cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self.model, self.sampling, self.device, self.options.precision)

    def _enlarge(self, picture: Picture, name: str) -> np.ndarray:
        """float32 (3, H, W) in [0, 1], of the result's size: the model's result reduced by averaging areas.

        The model's input is enlarged bicubically first where its factor is not enough, and reduced to the result's
        size where that is smaller.
        """
        import torch

        scale, sizes = self.model.description.scale, self._size(picture)
        rgb_CHW = picture.rgb()
        fitting = [min(max(have, -(-side // scale)), side) for have, side in zip(rgb_CHW.shape[1:], sizes, strict=True)]
        generator = torch.Generator().manual_seed(self.options.seed)
        enlarged = self._sampler(torch.from_numpy(_resized(rgb_CHW, fitting)), generator, name)
        return _resized(enlarged.numpy(), sizes)


def _resized(rgb_CHW: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Reduced by areas or enlarged bicubically to (height, width), in [0, 1]; as it is where it has that size."""
    height, width = sizes
    if rgb_CHW.shape[1:] == (height, width):
        return rgb_CHW
    way = cv2.INTER_AREA if height * width < rgb_CHW[0].size else cv2.INTER_CUBIC
    resized_HWC = cv2.resize(np.ascontiguousarray(rgb_CHW.transpose(1, 2, 0)), (width, height), interpolation=way)
    return np.ascontiguousarray(resized_HWC.transpose(2, 0, 1)).clip(0, 1)


def _read(source: Input) -> bytes:
    try:
        return source.storage.read(source.path)
    except FileNotFoundError:
        raise DeeDSRError("there is no such file: it is gone, or a pipe, or a link that leads nowhere") from None
