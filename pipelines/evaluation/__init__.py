"""Evaluation: a model and bicubic interpolation measured on the same pairs of a dataset, here or on a cluster."""

from pipelines.evaluation.run import EvaluationResult, evaluate

__all__ = ["EvaluationResult", "evaluate"]
