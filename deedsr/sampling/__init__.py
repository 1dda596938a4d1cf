"""Sampling: the pipeline, noise guidance, colour correction."""

from typing import TYPE_CHECKING, Any

from deedsr.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from deedsr.sampling.pipeline import DeeDSRPipeline

__all__ = ["DeeDSRPipeline", "SamplingSettings"]


def __getattr__(name: str) -> Any:
    """The pipeline is loaded when first asked for: diffusers takes seconds, which a look at a base need not."""
    if name != "DeeDSRPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deedsr.sampling.pipeline import DeeDSRPipeline

    return DeeDSRPipeline
