"""Upscaling of pictures from anywhere to anywhere, here or on a cluster; a bad one does not stop the others."""

from pipelines.upscaling.run import UpscaleResult, upscale

__all__ = ["UpscaleResult", "upscale"]
