"""The second-order degradation chain: blur, resize, noise, JPEG, and again (docs/method.md, degradation).

Images inside the chain are BGR, uint8 or the pixels of `fixed_point`, by which the same draws give the same bytes on
every processor; compression is the real codec (YCbCr 4:2:0), not a differentiable copy of it. Data workers call
`prepare_worker`.
"""

import math
import platform
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from deedsr.degradation import noise
from deedsr.degradation.fixed_point import BLACK, WHITE, largest, operand, symmetric_weights, to_levels, to_pixels
from deedsr.degradation.kernels import blur_kernel, profile
from deedsr.degradation.resizing import resample

_JPEG_LIMIT = 65_500  # pixels a side
_DIRECT = 130 if platform.machine() in ("x86_64", "AMD64") else 50  # OpenCV transforms kernels of so many elements
_INVISIBLE = 2e-4  # sum of weights that may be left out of a kernel
_BLOCK = 31 << 20  # bytes; glibc learns from blocks of up to 32 MiB


def prepare_worker() -> None:
    """Set up a process that makes samples: one thread for OpenCV, and memory that stays with the process.

    By default glibc returns every freed image to the kernel, and the page faults of the next one cost as much as a
    blur. It stops once a block of that size has been freed (mallopt(3), M_MMAP_THRESHOLD); others ignore it.
    """
    cv2.setNumThreads(1)
    np.empty(_BLOCK, np.uint8)


def degrade(hr: np.ndarray, draws: dict[str, Any]) -> np.ndarray:
    """Degrade an HR image (uint8 HWC RGB) as `draws` of `draw_degradation` say; returns the LR image (uint8 HWC RGB).

    A pure function: the same image and draws, also after a round trip through JSON, give the same bytes. Raises
    `ValueError` for another kind of image or for draws made for another size.
    """
    if hr.dtype != np.uint8 or hr.ndim != 3 or hr.shape[2] != 3:
        raise ValueError(f"an HR image must be uint8 of shape (height, width, 3), got {hr.dtype} of shape {hr.shape}")
    if list(hr.shape[:2]) != list(draws["size"]):
        raise ValueError(f"the draws are for an HR image of size {draws['size']}, got {list(hr.shape[:2])}")
    image = cv2.cvtColor(hr, cv2.COLOR_RGB2BGR)
    for step in draws["steps"]:
        name, parameters = step["step"], {key: value for key, value in step.items() if key != "step"}
        image = _STEPS[name](image, **parameters)
    return cv2.cvtColor(to_levels(image), cv2.COLOR_BGR2RGB)


def blur(image: np.ndarray, kernel: str, size: int, **parameters: float) -> np.ndarray:
    """Correlate with a kernel of `kernels.blur_kernel`; borders are reflected."""
    if kernel == "isotropic":  # the product of a column and a row
        whole, unit = operand(image)
        line = symmetric_weights(_significant(profile(size, parameters["sigma_x"])[None]), unit * largest(whole))
        return correlate(correlate(whole, unit * line.T), line)
    whole, unit = operand(image, coarse=True)  # hundreds of weights need the bits more than the pixels do
    weights = symmetric_weights(_significant(blur_kernel(kernel, size, **parameters)), largest(whole))
    return correlate(whole, unit * weights)


def correlate(whole: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlate whole numbers with weights that make their sums exact; rounded to whole numbers again."""
    weights = weights.astype(np.float32)
    if weights.size < _DIRECT:
        blurred = cv2.filter2D(whole, cv2.CV_32F, weights, borderType=cv2.BORDER_REFLECT_101)
        return np.rint(blurred, out=blurred)

    # OpenCV takes the Fourier transform of larger kernels: hand it blocks of this one. Exact sums may be cut anywhere.
    (height, width), (rows, columns) = whole.shape[:2], weights.shape
    padded = cv2.copyMakeBorder(whole, *(rows // 2,) * 2, *(columns // 2,) * 2, cv2.BORDER_REFLECT_101)
    block_columns = min(columns, _DIRECT - 1)
    block_rows = (_DIRECT - 1) // block_columns
    blurred = np.zeros_like(whole)
    for top in range(0, rows, block_rows):
        for left in range(0, columns, block_columns):
            block = weights[top : top + block_rows, left : left + block_columns]
            part = padded[top : top + height + len(block) - 1, left : left + width + block.shape[1] - 1]
            blurred += cv2.filter2D(part, cv2.CV_32F, block, anchor=(0, 0))[:height, :width]
    return np.rint(blurred, out=blurred)


def _significant(kernel: np.ndarray) -> np.ndarray:
    """The kernel without its smallest weights, which in all move no pixel by 0.05 levels, and without empty margins."""
    magnitude = np.abs(kernel)
    ascending = np.sort(magnitude, axis=None)
    least = ascending[np.searchsorted(np.add.accumulate(ascending), _INVISIBLE)]
    kept = np.where(magnitude < least, 0.0, kernel)
    margins = [np.flatnonzero(kept.any(axis=axis))[0] for axis in (1, 0)]
    kept = kept[tuple(slice(margin, side - margin) for margin, side in zip(margins, kept.shape, strict=True))]
    return kept / math.fsum(kept.ravel().tolist())


def rescale(image: np.ndarray, mode: str, factor: float) -> np.ndarray:
    """Resize by a factor, sizes rounded down, as `F.interpolate(scale_factor=factor)` does without antialiasing."""
    if factor == 1:
        return image
    height, width = image.shape[:2]
    return resample(image, mode, (int(height * factor), int(width * factor)), (1 / factor, 1 / factor))


def resize(image: np.ndarray, mode: str, size: list[int], factor: float = 1.0) -> np.ndarray:
    """Resize to `size` (height, width), as `F.interpolate(size=size)` does without antialiasing.

    `factor`: the drawn factor that `size` follows from.
    """
    height, width = size
    return resample(image, mode, (height, width), (image.shape[0] / height, image.shape[1] / width))


def add_noise(image: np.ndarray, family: str, gray: bool, seed: int, **strength: float) -> np.ndarray:
    """Add Gaussian (`sigma`) or Poisson (`scale`) noise and clip to 8 bits."""
    add: Callable[..., np.ndarray] = noise.add_gaussian if family == "gaussian" else noise.add_poisson
    noisy = add(to_pixels(image), gray=gray, seed=seed, **strength)
    return np.clip(noisy, BLACK, WHITE, out=noisy)


def compress(image: np.ndarray, quality: int) -> np.ndarray:
    """Through the JPEG codec and back; returns uint8."""
    if max(image.shape[:2]) > _JPEG_LIMIT:
        raise ValueError(f"JPEG holds at most {_JPEG_LIMIT} px a side, got {image.shape[0]}x{image.shape[1]}")
    encoded = cv2.imencode(".jpg", to_levels(image), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))


_STEPS: dict[str, Callable[..., np.ndarray]] = {
    "blur1": blur,
    "resize1": rescale,
    "noise1": add_noise,
    "jpeg1": compress,
    "blur2": blur,
    "resize2": resize,
    "noise2": add_noise,
    "resize3": resize,
    "sinc": blur,
    "jpeg2": compress,
}
