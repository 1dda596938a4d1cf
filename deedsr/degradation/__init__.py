"""Second-order degradation with every draw recorded: recipes, draws, and the chain that replays them."""

from deedsr.degradation.chain import degrade
from deedsr.degradation.draws import draw_degradation, scalar_parameters
from deedsr.degradation.recipe import ALGORITHM_VERSION, Recipe, builtin_recipes, load_recipe

__all__ = [
    "ALGORITHM_VERSION",
    "Recipe",
    "builtin_recipes",
    "degrade",
    "draw_degradation",
    "load_recipe",
    "scalar_parameters",
]
