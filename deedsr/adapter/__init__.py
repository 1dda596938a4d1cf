"""Stage 2: tell a frozen diffusion model what the low-resolution image shows and how it was degraded."""

from deedsr.adapter.adapter import ABLATIONS, DegradationAwareAdapter, freeze
from deedsr.adapter.condition_encoder import Condition, ConditionEncoder

__all__ = ["ABLATIONS", "Condition", "ConditionEncoder", "DegradationAwareAdapter", "freeze"]
