"""Which degradation a sample gets: its stratum, its generator, and what it shares with other samples.

A pure function of the recipe and of what the sample is, so that a dataset may be made in any order and in parts.
"""

from typing import Any, NamedTuple

from numpy.random import Generator

from deedsr.dataset.keys import generator, sample_key
from deedsr.dataset.recipe import Recipe
from deedsr.degradation.draws import draw_degradation
from deedsr.degradation.ranges import DegradationRanges

GROUPS_PER_VARIANT = 100  # largest number of variants in a recipe


class Assignment(NamedTuple):
    """`seed` of the sample; `stratum` by name, None without strata; `group`: samples with equal numbers share their
    degradation but for the noise fields, None if the sample has its own; `draws` as of `draw_degradation`."""

    seed: int
    stratum: str | None
    group: int | None
    draws: dict[str, Any]


def assign_degradation(recipe: Recipe, content: str, variant: int, size: tuple[int, int]) -> Assignment:
    """The degradation of variant `variant` of the crop named `content`, whose HR image has `size` (height, width)."""
    key = sample_key(content, variant)
    seed = int(generator("sample", recipe.seed, key).integers(2**63))
    if not recipe.distinct_degradations:
        stratum, ranges = _stratum(recipe, key)
        return Assignment(seed, stratum, None, draw_degradation(ranges, size, recipe.scale, _generator(seed)))

    chosen = int(generator("group", recipe.seed, content).integers(recipe.distinct_degradations))
    group = chosen * GROUPS_PER_VARIANT + variant
    stratum, ranges = _stratum(recipe, f"group {group}")
    shared = int(generator("shared", recipe.seed, group).integers(2**63))
    draws = draw_degradation(ranges, size, recipe.scale, _generator(shared))
    # One noise field for many contents would be a pattern to recognise, not a degradation.
    own = generator("noise", seed)
    for step in draws["steps"]:
        if "seed" in step:
            step["seed"] = int(own.integers(2**64, dtype="uint64"))
    return Assignment(seed, stratum, group, draws)


def _generator(seed: int) -> Generator:
    return generator("degradation", seed)


def _stratum(recipe: Recipe, identity: str) -> tuple[str | None, DegradationRanges]:
    """Name and ranges of the stratum that the hash of `identity` falls into."""
    if not recipe.strata:
        return None, recipe.degradation
    left = generator("stratum", recipe.seed, identity).random()
    for name in sorted(recipe.strata):  # a recipe's digest does not depend on the order in which they are written
        left -= recipe.strata[name].share
        if left < 0:
            break
    return name, recipe.strata[name].degradation
