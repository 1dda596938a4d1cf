"""Sampling: the pipeline, noise guidance, colour correction."""

from deedsr.sampling.pipeline import DeeDSRPipeline
from deedsr.sampling.settings import SamplingSettings

__all__ = ["DeeDSRPipeline", "SamplingSettings"]
