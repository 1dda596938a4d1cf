"""Stage 1: learn a vector that encodes how a low-resolution image was degraded."""

from deedsr.learner.moco import MomentumContrast, quadrant_pair
from deedsr.learner.normalization import GroupedBatchNorm2d, commit_statistics, pending_statistics
from deedsr.learner.resnet import DegradationLearner

__all__ = [
    "DegradationLearner",
    "GroupedBatchNorm2d",
    "MomentumContrast",
    "commit_statistics",
    "pending_statistics",
    "quadrant_pair",
]
