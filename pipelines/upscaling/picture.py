"""A picture as it is enlarged: its pixels upright, and what the networks do not see of it.

Array shapes: H W pixels, C channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from deedsr.dataset.pictures import MAX_PIXELS, RejectedImage, Stored, decode, read_stored, upright
from deedsr.errors import DeeDSRError

__all__ = ["Picture", "depth_of", "read_picture"]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]  # of grey in RGB, as everywhere in Pillow
_HINTS = {
    "too many pixels": f" (the limit is {MAX_PIXELS // 10**6} million): cut it into parts",
    "unsupported pixel format": ": convert it to 8 or 16 bits, grey or RGB, first",
}


class Picture(NamedTuple):
    pixels_HWC: np.ndarray  # uint8 or uint16
    profile: bytes | None  # ICC, of these channels
    exif: Image.Exif

    @property
    def deep(self) -> bool:
        return self.pixels_HWC.dtype == np.uint16

    @property
    def grey(self) -> bool:
        return self.pixels_HWC.shape[2] <= 2

    @property
    def alpha(self) -> np.ndarray | None:
        """(H, W)"""
        return None if self.pixels_HWC.shape[2] % 2 else self.pixels_HWC[..., -1]

    @property
    def opaque(self) -> bool:
        return self.alpha is None or bool((self.alpha == depth_of(self.pixels_HWC)).all())

    def rgb(self) -> np.ndarray:
        """float32 (3, H, W) in [0, 1], what the networks see."""
        colour = self.pixels_HWC[..., :1] if self.grey else self.pixels_HWC[..., :3]
        scaled = colour.astype(np.float32) / np.float32(depth_of(colour))
        return np.ascontiguousarray(np.broadcast_to(scaled, (*scaled.shape[:2], 3)).transpose(2, 0, 1))

    def enlarged(self, rgb_CHW: np.ndarray, deep: bool) -> "Picture":
        """The same picture with its larger colours, float in [0, 1]; grey and transparency as they were.

        `deep`: 16 bits, else 8. Transparency is enlarged bicubically.
        """
        channels = [(rgb_CHW * _LUMA).sum(0)] if self.grey else [*rgb_CHW]
        if self.alpha is not None:
            size = rgb_CHW.shape[:0:-1]
            alpha = Image.fromarray(self.alpha.astype(np.float32) / np.float32(depth_of(self.alpha)))
            channels.append(np.asarray(alpha.resize(size, Image.Resampling.BICUBIC)))
        dtype = np.uint16 if deep else np.uint8
        highest = np.float32(np.iinfo(dtype).max)
        pixels_HWC = np.stack([np.rint(x.clip(0, 1) * highest).astype(dtype) for x in channels], -1)
        return self._replace(pixels_HWC=pixels_HWC)


def depth_of(pixels: np.ndarray) -> int:
    """The highest value that these integers can have: 255 or 65535."""
    return int(np.iinfo(pixels.dtype).max)


def read_picture(data: bytes) -> Picture:
    """A picture file's first frame, upright. CMYK becomes sRGB. Raises DeeDSRError saying what is wrong with it."""
    try:
        stored = read_stored(data, deep=True, others=True)
        if stored.colour.ndim == 3 and stored.colour.shape[2] == 4:
            stored = Stored(decode(data), None, 1, None)
    except RejectedImage as rejection:
        raise DeeDSRError(f"{rejection}{_HINTS.get(str(rejection), '')}") from None
    except MemoryError:
        raise DeeDSRError("not enough memory to decode it: cut it into parts") from None
    grey, exif = _about(data)
    colour, profile = stored.colour, stored.profile
    if colour.ndim == 3 and grey:
        colour = colour[..., 0]
    if profile and not _describes(profile, grey=colour.ndim == 2):
        profile = None
    channels = [colour[..., None] if colour.ndim == 2 else colour]
    if stored.alpha is not None:
        channels.append(stored.alpha[..., None])
    pixels_HWC = upright(np.ascontiguousarray(np.concatenate(channels, -1)), stored.orientation)
    return Picture(np.atleast_3d(pixels_HWC), profile, exif)  # OpenCV drops a single channel


def _about(data: bytes) -> tuple[bool, Image.Exif]:
    """Whether a picture that was read before is grey, and its EXIF, empty where it cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        # Pillow takes 16-bit grey with alpha for colours; a PNG's own type is in its header.
        grey = data[25] in (0, 4) if image.format == "PNG" else image.mode in ("1", "L", "LA")
        try:
            return grey, image.getexif()
        except Exception:  # EXIF of another program: struct.error, SyntaxError, ValueError, KeyError ...
            return grey, Image.Exif()


def _describes(profile: bytes, grey: bool) -> bool:
    """Whether a profile is whole and of these channels."""
    try:
        space = ImageCms.getOpenProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return False
    return space == ("GRAY" if grey else "RGB")
