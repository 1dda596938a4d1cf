"""Image statistics that depend on blur, noise and compression and little on content.

Trained on a few dozen photographs, a small network on pixels learns to recognise content instead of degradations. These
statistics are its input instead: DCT coefficients of 8x8 blocks, which JPEG rounds to multiples of its quantisation
steps, and the power spectrum, which blur and noise shape.

Shape suffixes: B batch, C channels, H W space, K coefficients of a block, N blocks, Q qualities, S statistics.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from deedsr.learner.normalization import FullPrecisionBuffers
from deedsr.precision import exact_products

BLOCK, PATCH = 8, 32  # pixels a side: of JPEG's blocks, of the windows of the spectrum
QUALITIES = range(28, 97, 2)  # of JPEG, tested for traces
FLOOR = 0.1  # added before a logarithm, in levels of 8-bit pixels
RANGE = 1.0, 255.0  # of an entry of a quantisation table
AT_ONCE = 2**24  # elements of a temporary on a GPU, 64 MiB

# Quantisation tables of ITU-T T.81, Annex K, which JPEG encoders scale by their quality.
LUMA_TABLE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
CHROMA_TABLE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99,
    99, 99, 99, *(99,) * 32,
)  # fmt: skip
# RGB to YCbCr (JFIF), without the offsets, which the statistics do not depend on.
YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


def dct_basis() -> Tensor:
    """Basis functions of the orthonormal 8x8 DCT (64, 1, 8, 8), in the row-major order of JPEG's tables."""
    place = torch.arange(BLOCK, dtype=torch.float64)
    rows = torch.cos(math.pi * (2 * place + 1) * place[:, None] / (2 * BLOCK)) * (2 / BLOCK) ** 0.5
    rows[0] /= 2**0.5
    return (rows[:, None, :, None] * rows[None, :, None, :]).reshape(BLOCK**2, 1, BLOCK, BLOCK).float()


def quantisation_tables(base: tuple[int, ...]) -> Tensor:
    """JPEG's quantisation table at each of QUALITIES, (Q, 64)."""
    scale = torch.tensor([5000 // q if q < 50 else 200 - 2 * q for q in QUALITIES])
    return ((torch.tensor(base) * scale[:, None] + 50) // 100).float().clamp(*RANGE)


class PictureStatistics(FullPrecisionBuffers):
    """RGB in [0, 1] of any size (B, 3, H, W) to `size` statistics per picture (B, S), fp32. No parameters.

    - For each DCT coefficient c of 8x8 blocks, of Y, Cb, Cr and of Cb, Cr at half resolution: mean of log |c|, log of
      mean |c|, mean of exp(-|c|).
    - For luma and chroma and each of QUALITIES: mean of cos(2 pi c / step) over the coefficients above half a
      quantisation step, 1 where all are multiples of the step.
    - Logarithm of the mean power spectrum of Y in windows of 32 px.

    Rows and columns beyond the last multiple of 16 px are ignored; sides below 32 px are padded by replication. Blocks
    start at the upper left corner.
    """

    basis: Tensor
    luma_QC: Tensor
    chroma_QC: Tensor
    window: Tensor
    ycbcr: Tensor

    def __init__(self) -> None:
        super().__init__()
        hann = torch.hann_window(PATCH, periodic=False)
        constants = {
            "basis": dct_basis(),
            "luma_QC": quantisation_tables(LUMA_TABLE),
            "chroma_QC": quantisation_tables(CHROMA_TABLE),
            "window": hann[:, None] * hann,
            "ycbcr": torch.tensor(YCBCR),
        }
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)
        self.size = 3 * 5 * BLOCK**2 + 2 * len(QUALITIES) + (PATCH // 2) * (PATCH // 4)

    @torch.no_grad()
    def forward(self, rgb_BCHW: Tensor) -> Tensor:
        with exact_products(rgb_BCHW.device):
            return self._statistics(rgb_BCHW.float())

    def _statistics(self, rgb_BCHW: Tensor) -> Tensor:
        height, width = (side if side < PATCH else side - side % (2 * BLOCK) for side in rgb_BCHW.shape[2:])
        rgb_BCHW = rgb_BCHW[..., :height, :width]
        missing = (0, max(0, PATCH - width), 0, max(0, PATCH - height))
        levels_BCHW = 255 * (F.pad(rgb_BCHW, missing, mode="replicate") if any(missing) else rgb_BCHW)
        planes_BCHW = torch.einsum("pc,bchw->bphw", self.ycbcr, levels_BCHW)
        fine = self._coefficients(planes_BCHW)
        coarse = self._coefficients(F.avg_pool2d(planes_BCHW[:, 1:], 2))
        statistics = [_moments(fine), _moments(coarse)]
        statistics.append(_fit(fine[:, 0], self.luma_QC))
        statistics.append(_fit(coarse.transpose(1, 2).flatten(2), self.chroma_QC))
        statistics.append(self._spectrum(planes_BCHW[:, :1]))
        return torch.cat(statistics, 1)

    def _coefficients(self, planes_BCHW: Tensor) -> Tensor:
        """DCT coefficients of all blocks (B, C, 64, N)."""
        batch, channels, height, width = planes_BCHW.shape
        blocks = F.conv2d(planes_BCHW.reshape(-1, 1, height, width), self.basis, stride=BLOCK)
        return blocks.view(batch, channels, BLOCK**2, -1)

    def _spectrum(self, luma_B1HW: Tensor) -> Tensor:
        windows = luma_B1HW.unfold(2, PATCH, PATCH // 2).unfold(3, PATCH, PATCH // 2).flatten(1, 3)
        windows = (windows - windows.mean((2, 3), keepdim=True)) * self.window
        power = torch.fft.rfft2(windows)[..., : PATCH // 2].abs().square().mean(1, keepdim=True)
        return F.avg_pool2d((power + FLOOR).log(), 2).flatten(1)


def _moments(coefficients_BCKN: Tensor) -> Tensor:
    size = coefficients_BCKN.abs()
    moments = ((size + FLOOR).log().mean(3), (size.mean(3) + FLOOR).log(), (-size).exp().mean(3))
    return torch.stack(moments, 1).flatten(1)


def _fit(coefficients_BKN: Tensor, steps_QK: Tensor, together: int | None = None) -> Tensor:
    """Mean of cos(2 pi c / step) of each quality, -1 to 1 (B, Q). DC coefficients are left out: JPEG subtracts 128.

    `together`: qualities computed at once. On a CPU one, whose temporaries stay in the cache; on a GPU as many as
    AT_ONCE allows: one by one they are most of the kernels of a step of the learner that has statistics alone.
    """
    coefficients_B1KN = coefficients_BKN[:, None, 1:]
    if together is None:
        on_cpu = coefficients_BKN.device.type == "cpu"
        together = 1 if on_cpu else max(1, AT_ONCE // coefficients_B1KN.numel())
    size_B1KN, turns_B1KN, fits = coefficients_B1KN.abs(), 2 * math.pi * coefficients_B1KN, []
    for steps_QK1 in steps_QK[:, 1:, None].split(together):
        counted = (size_B1KN > steps_QK1 / 2).float()
        fitting = torch.cos(turns_B1KN / steps_QK1) * counted
        fits.append(fitting.sum((2, 3)) / (counted.sum((2, 3)) + 1))
    return torch.cat(fits, 1)
