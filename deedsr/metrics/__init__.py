"""Image quality: PSNR and SSIM on the Y channel, NIQE."""

from deedsr.metrics.fidelity import psnr_y, ssim_y
from deedsr.metrics.niqe import niqe, niqe_features, niqe_of_features, niqe_set

__all__ = ["niqe", "niqe_features", "niqe_of_features", "niqe_set", "psnr_y", "ssim_y"]
