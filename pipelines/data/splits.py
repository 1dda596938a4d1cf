"""Datasets without a validation split: why there is none, and how to have one."""

from deedsr.dataset.recipe import Recipe, builtin_recipes

_SHARE = 0.2  # that gives few photographs some


def no_validation(uri: str, recipe: Recipe) -> str:
    """One sentence for a dataset of `recipe` at `uri` none of whose samples is for validation."""
    split = recipe.split
    if split.validation_patterns:
        patterns = ", ".join(map(repr, split.validation_patterns))
        why = f"split.validation_patterns ({patterns}) of recipe {recipe.name} match no source that was used"
    else:
        why = f"split.validation_share {split.validation_share:g} of recipe {recipe.name} took none of the sources"
    file = f"a recipe file with `base: {recipe.name}`" if recipe.name in builtin_recipes() else "its recipe file"
    return (
        f"{uri} has no validation split: {why}; for one, generate it with {file} and "
        f"`split: {{validation_share: {_SHARE}}}`, or validation_patterns that match some of the sources"
    )
