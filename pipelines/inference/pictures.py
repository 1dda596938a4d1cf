"""A picture as it is enlarged: its pixels upright, and what the networks do not see of it.

Array shapes: H W pixels, C channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
"""

from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from deedsr.dataset.colour import ColourSpace, to_srgb
from deedsr.dataset.pictures import MAX_PIXELS, RejectedImage, read_stored, upright
from deedsr.errors import DeeDSRError

__all__ = ["Picture", "depth_of", "read_picture"]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]  # of grey in RGB, as everywhere in Pillow
_HINTS = {
    "too many pixels": f" (the limit is {MAX_PIXELS // 10**6} million): cut it into parts",
    "unsupported pixel format": ": convert it to 8 or 16 bits, grey or RGB, first",
}


class Picture(NamedTuple):
    pixels_HWC: np.ndarray  # uint8 or uint16
    space: ColourSpace
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

    @property
    def neutral(self) -> bool:
        """Whether it is grey, also where it is stored as RGB: the channels of every visible pixel are equal.

        Up to one 8-bit level, the error of grey that was compressed as WebP.
        """
        if self.grey:
            return True
        colour_HWC, alpha = self.pixels_HWC[..., :3], self.alpha
        lowest, highest = colour_HWC.min(-1), colour_HWC.max(-1)
        tinted = highest - lowest > (257 if self.deep else 1)
        return not (tinted if alpha is None else tinted & (alpha > 0)).any()

    def rgb(self) -> np.ndarray:
        """float32 (3, H, W) in [0, 1], the input of the networks.

        A wholly transparent pixel takes the colour of the nearest visible one: its own would tint the edge.
        """
        colour = self.pixels_HWC[..., :1] if self.grey else self.pixels_HWC[..., :3]
        if self.alpha is not None:
            colour = _bled(colour, self.alpha)
        scaled = colour.astype(np.float32) / np.float32(depth_of(colour))
        return np.ascontiguousarray(np.broadcast_to(scaled, (*scaled.shape[:2], 3)).transpose(2, 0, 1))

    def enlarged(self, rgb_CHW: np.ndarray, deep: bool) -> "Picture":
        """The same picture with its larger colours, float in [0, 1]; grey and transparency as they were.

        `deep`: 16 bits, else 8. Transparency is enlarged bicubically.
        """
        channels = [(rgb_CHW * _LUMA).sum(0)] * (1 if self.grey else 3) if self.neutral else [*rgb_CHW]
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
        stored = read_stored(data, others=True)
    except RejectedImage as rejection:
        raise DeeDSRError(f"{rejection}{_HINTS.get(str(rejection), '')}") from None
    except MemoryError:
        raise DeeDSRError("not enough memory to decode it: cut it into parts") from None
    colour, space = stored.colour, stored.space
    if colour.ndim == 3 and colour.shape[2] == 4:
        colour, space = to_srgb(colour, space.profile), ColourSpace()
    channels = [np.atleast_3d(colour)]
    if stored.alpha is not None:
        channels.append(stored.alpha[..., None])
    pixels_HWC = upright(np.ascontiguousarray(np.concatenate(channels, -1)), stored.orientation)
    return Picture(np.atleast_3d(pixels_HWC), space, stored.exif)  # OpenCV drops a single channel


def _bled(colour_HWC: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours, with wholly transparent pixels filled from the nearest visible one."""
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return colour_HWC
    _, nearest = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    by_label = np.empty((nearest.max() + 1, colour_HWC.shape[2]), colour_HWC.dtype)
    by_label[nearest[~hidden]] = colour_HWC[~hidden]
    return by_label[nearest]
