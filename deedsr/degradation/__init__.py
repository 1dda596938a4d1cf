"""Second-order degradation with every draw recorded: the draws, and the chain that replays them."""

from deedsr.degradation.chain import degrade
from deedsr.degradation.draws import draw_degradation, scalar_parameters

__all__ = ["degrade", "draw_degradation", "scalar_parameters"]
