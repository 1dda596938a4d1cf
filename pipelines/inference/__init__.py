"""Models applied: evaluation on the pairs of a dataset, upscaling of pictures from anywhere; here or on a cluster."""

from pipelines.inference.evaluation import EvaluationResult, evaluate
from pipelines.inference.upscaling import UpscaleResult, upscale

__all__ = ["EvaluationResult", "UpscaleResult", "evaluate", "upscale"]
