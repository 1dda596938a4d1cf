"""Image quality: metrics by name (`registry`), and PSNR-Y, SSIM-Y and NIQE as plain functions."""

from deedsr.metrics.fidelity import psnr_y, ssim_y
from deedsr.metrics.niqe import niqe, niqe_features, niqe_of_features, niqe_set

__all__ = ["niqe", "niqe_features", "niqe_of_features", "niqe_set", "psnr_y", "ssim_y"]
