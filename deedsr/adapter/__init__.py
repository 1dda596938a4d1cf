"""Stage 2: condition a frozen diffusion model on the content and the degradation of a low-resolution image."""

from deedsr.adapter.adapter import ABLATIONS, DegradationAwareAdapter, freeze
from deedsr.adapter.condition_encoder import Condition, ConditionEncoder

__all__ = ["ABLATIONS", "Condition", "ConditionEncoder", "DegradationAwareAdapter", "freeze"]
