"""Pictures to tensors and back, and bicubic enlargement with reflection padding.

Shape suffixes: B batch, C channels, H W pixels.
"""

from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from deedsr.sampling.tiles import Window

Picture: TypeAlias = Image.Image | np.ndarray | torch.Tensor
Pictures: TypeAlias = list[Image.Image] | list[np.ndarray] | list[torch.Tensor] | np.ndarray | torch.Tensor
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
STRIP = 2**20  # pixels
BICUBIC_REACH = 2  # LR pixels on either side


def to_tensors(pictures: Picture | list[Picture]) -> list[torch.Tensor]:
    """RGB tensors (3, H, W) in [0, 1], float32, of one picture or several.

    A picture is a PIL image, a uint8 array (H, W, 3) or a floating-point tensor (3, H, W) in [0, 1]; an array or
    tensor of four dimensions and a list are several pictures. A transparent image is laid over white, 16-bit grey
    keeps its bits. Raises ValueError for anything else.
    """
    if isinstance(pictures, np.ndarray | torch.Tensor) and pictures.ndim == 4:
        pictures = list(pictures)
    tensors = [_to_tensor(picture) for picture in (pictures if isinstance(pictures, list | tuple) else [pictures])]
    if not tensors:
        raise ValueError("no picture given")
    return tensors


def _to_tensor(picture: Picture) -> torch.Tensor:
    if isinstance(picture, Image.Image):
        if picture.mode.startswith("I;16"):
            grey = torch.from_numpy(np.asarray(picture).astype(np.float32) / 65535)
            return grey.expand(3, *grey.shape).contiguous()
        if picture.mode in ("I", "F"):  # Pillow would cut off all above 255
            raise ValueError(f"PIL images of mode {picture.mode} have no known range: convert it to L, I;16 or RGB")
        if picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        picture = np.array(picture.convert("RGB"))
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
            raise ValueError(f"arrays must be uint8 RGB (H, W, 3), got {picture.dtype} of shape {picture.shape}")
        return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).float() / 255
    if not isinstance(picture, torch.Tensor):
        raise ValueError(f"pictures must be PIL images, uint8 arrays or tensors, got {type(picture).__name__}")
    if not picture.is_floating_point() or picture.ndim != 3 or picture.shape[0] != 3 or picture.numel() == 0:
        raise ValueError(f"tensors must be floating-point RGB (3, H, W), got {picture.dtype} of {tuple(picture.shape)}")
    low, high = picture.aminmax()
    if not (low >= 0 and high <= 1):  # written so that NaN is refused too
        raise ValueError(f"tensors must lie in [0, 1], got {low:.3g} to {high:.3g}")
    return picture.float()


def from_tensors(pictures: list[torch.Tensor], output_type: str) -> Pictures:
    """Tensors (3, H, W) in [0, 1] as PIL images (`pil`), arrays (H, W, 3) in [0, 1] (`np`) or tensors (`pt`, `latent`).

    As in diffusers, arrays and tensors of one size come stacked; of several sizes they stay a list.
    """
    if output_type == "pil":
        return [Image.fromarray(to_uint8(picture)) for picture in pictures]
    same_size = len({picture.shape for picture in pictures}) == 1
    if output_type in ("pt", "latent"):
        return torch.stack(pictures) if same_size else pictures
    arrays = [picture.permute(1, 2, 0).cpu().numpy() for picture in pictures]
    return np.stack(arrays) if same_size else arrays


def to_uint8(picture_CHW: torch.Tensor) -> np.ndarray:
    """A tensor (3, H, W) in [0, 1] as uint8 array (H, W, 3), rounded to the nearest."""
    height, width = picture_CHW.shape[1:]
    array = np.empty((height, width, 3), np.uint8)
    for rows in strips(height, width):
        array[rows] = (picture_CHW[:, rows] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return array


def strips(height: int, width: int) -> list[slice]:
    """Rows of a picture in parts of about STRIP pixels, so that operations on them need little extra memory."""
    rows = max(STRIP // width, 1)
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def mirrored(have: int, begin: int, end: int) -> torch.Tensor:
    """Where positions begin .. end - 1 of a padded side come from: 0 1 2 1 0 1 ... for have = 3."""
    period = max(2 * (have - 1), 1)
    index = torch.arange(begin, end) % period
    return torch.minimum(index, period - index) if have > 1 else torch.zeros_like(index)


def enlarge(lr_BCHW: torch.Tensor, scale: int) -> torch.Tensor:
    """Bicubic enlargement in [0, 1], not antialiased, overshoot cut off: the LR image as the base sees it."""
    return interpolate(lr_BCHW, scale_factor=scale, mode="bicubic", align_corners=False).clamp(0, 1)


def enlarge_window(lr_BCHW: torch.Tensor, scale: int, window: Window) -> torch.Tensor:
    """A window, in its pixels, of the enlarged image, which goes on mirrored beyond right and bottom.

    The same numbers as cutting it out of the whole, which is never made.
    """
    indices = []
    for dim, (begin, end) in ((2, window[:2]), (3, window[2:])):
        index = mirrored(scale * lr_BCHW.shape[dim], begin, end)
        first = max(int(index.min()) // scale - BICUBIC_REACH, 0)
        last = min(int(index.max()) // scale + BICUBIC_REACH, lr_BCHW.shape[dim] - 1)
        lr_BCHW = lr_BCHW.narrow(dim, first, last - first + 1)
        indices.append((index - scale * first).to(lr_BCHW.device))
    return enlarge(lr_BCHW, scale)[:, :, indices[0]][:, :, :, indices[1]]
