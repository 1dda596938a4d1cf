"""Recipes: everything but the sources that fixes a dataset, as data files with typed, checked fields."""

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from deedsr.degradation.ranges import DegradationRanges, Probability, Strict
from deedsr.errors import UsageError, explained

# Increased whenever the same recipe and sources would give other bytes than before. Not for
# corrections in reading a few kinds of sources (docs/data.md lists them): every dataset would be made anew.
ALGORITHM_VERSION = 2

Count = Annotated[int, Field(ge=1)]


class Crop(Strict):
    """Which crops of a source become HR images."""

    size: Annotated[int, Field(ge=32)]  # side of a crop, pixels
    place: Literal["grid", "center", "anywhere"] = "grid"  # cells of a grid; the middle; places that may overlap
    per_source: Count  # at most so many crops of one source
    min_std: Annotated[float, Field(ge=0)]  # least standard deviation of grey, 8-bit levels
    min_laplacian: Annotated[float, Field(ge=0)]  # least variance of the Laplacian of grey: sharpness

    @model_validator(mode="after")
    def _one_in_the_middle(self) -> Self:
        if self.place == "center" and self.per_source != 1:
            raise ValueError(f"place center is one crop of each source: per_source must be 1, got {self.per_source}")
        return self


class Formats(Strict):
    """How images are stored. PNG and WebP are lossless, JPEG is for HR only."""

    hr: Literal["png", "webp", "jpeg"]
    hr_quality: Annotated[int, Field(ge=1, le=100)]  # JPEG only
    lr: Literal["png", "webp"]


class Shard(Strict):
    """How many sources a shard holds; where it ends follows from the hashes of its sources."""

    min_sources: Count
    target_sources: Count
    max_sources: Count

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min_sources <= self.target_sources <= self.max_sources:
            raise ValueError(
                "must have min_sources <= target_sources <= max_sources, "
                f"got {self.min_sources}, {self.target_sources}, {self.max_sources}"
            )
        return self


class Split(Strict):
    """Which sources are for validation: those whose relative path matches a pattern; without patterns, a share."""

    validation_patterns: tuple[str, ...]  # fnmatch patterns
    validation_share: Probability


class Weight(Strict):
    """Sources that count for more, or less, than the others: the first pattern that matches decides."""

    pattern: str  # fnmatch, on the relative path
    variants: Annotated[int, Field(ge=1, le=100)]  # in place of the recipe's


class Stratum(Strict):
    """One severity of degradation and how often it is drawn."""

    share: Annotated[float, Field(gt=0, le=1)]  # of the samples, in expectation
    degradation: DegradationRanges


def _named(name: str) -> str:
    if not name.strip():
        raise ValueError("must not be empty")
    return name


class Recipe(Strict):
    """Everything but the sources that fixes a dataset. `model_dump(mode="json")` and `model_validate` are inverse."""

    name: Annotated[str, AfterValidator(_named)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    scale: Literal[2, 3, 4]
    variants: Annotated[int, Field(ge=1, le=100)]  # independent degradations of each crop
    weights: tuple[Weight, ...] = ()  # other numbers of variants for some sources
    crop: Crop
    flip: Probability  # of mirroring a crop left to right
    rotate: Probability = 0.0  # of turning a crop by 90, 180 or 270 degrees, each as likely
    alpha: Literal["composite", "reject"] = "composite"  # pictures with transparency: over white, or left out
    duplicates: Literal["keep", "reject"] = "keep"  # reject: of equal files the first by path is used; reads all first
    formats: Formats
    shard: Shard
    split: Split
    max_rejected_share: Probability  # of the sources; with more, generation fails
    distinct_degradations: Annotated[int, Field(ge=0)] = 0  # contents share so many per variant; 0 = each its own
    strata: dict[str, Stratum] = {}  # severities in place of `degradation`, drawn by each sample's own hash
    degradation: DegradationRanges

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        total = sum(stratum.share for stratum in self.strata.values())
        if self.strata and abs(total - 1) > 1e-6:
            raise ValueError(f"strata: the shares must sum to 1, got {total:g}")
        if self.crop.size % self.scale:
            raise ValueError(f"crop.size must be a multiple of scale, got {self.crop.size} and {self.scale}")
        return self

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of the canonical JSON of every field and the algorithm's version.

        `crop.place: grid` is left out, so that recipes from before the key existed keep their digest.
        """
        recipe = self.model_dump(mode="json")
        if self.crop.place == "grid":
            del recipe["crop"]["place"]
        fields = {"algorithm_version": ALGORITHM_VERSION, "recipe": recipe}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def variants_of(self, path: str) -> int:
        """How many degradations each crop of the source at this relative path gets."""
        return next((w.variants for w in self.weights if fnmatchcase(path, w.pattern)), self.variants)

    def degrading(self, other: Self) -> Self:
        """This recipe with the degradations of `other`, to make new LR images for its HR images.

        Settings of the HR images and shards stay; name, seed, variants, weights, strata, degradation and the
        LR's format are the other's.
        """
        theirs = ("name", "seed", "variants", "weights", "distinct_degradations", "strata", "degradation")
        formats = self.formats.model_copy(update={"lr": other.formats.lr})
        return self.model_copy(update={name: getattr(other, name) for name in theirs} | {"formats": formats})


_BUILTIN = files("deedsr.dataset") / "recipes"
_DEFAULT = "deedsr"  # the one recipe that gives every key


def builtin_recipes() -> list[str]:
    """Names of the recipes inside the package, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _BUILTIN.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(given: str | Path | Mapping[str, Any]) -> Recipe:
    """The built-in recipe of that name, else the YAML file at that path; a mapping is the content of such a file.

    A file gives only the keys that differ from its base: `base: NAME`, a built-in recipe or another file beside it,
    `deedsr` unless named. A list replaces the base's. In `strata`, a number is the share of the built-in recipe or file
    of that name, a mapping gives `share` and the ranges of `degradation` that differ from the recipe's own. Raises
    `UsageError` naming the key, its value and what is accepted.
    """
    name = "inline" if isinstance(given, Mapping) else str(given)
    fields = _on_its_base(dict(given), name, Path(), ()) if isinstance(given, Mapping) else _read(name, Path(), ())
    fields = _with_strata(fields, name)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(explained(problem, Recipe) for problem in error.errors())
        raise UsageError(f"recipe {name}: {problems}") from None


def _read(name: str, folder: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """The keys of a recipe, its base's included."""
    if name in builtin_recipes():
        source, place = (_BUILTIN / f"{name}.yaml").read_bytes(), folder
    else:
        path = folder / name
        place = path.parent
        try:
            source = path.read_bytes()
        except FileNotFoundError:
            raise UsageError(
                f"no recipe {name!r}: it is neither a file nor one of {', '.join(builtin_recipes())}"
            ) from None
        except OSError as error:
            raise UsageError(f"recipe {name} cannot be read: {error}") from None
        name = str(path.resolve())
    if name in seen:
        raise UsageError(f"recipe {name} is its own base: {' -> '.join((*seen, name))}")
    try:
        fields = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise UsageError(f"recipe {name} must be a YAML mapping of keys, got {type(fields).__name__}")
    return fields if name == _DEFAULT else _on_its_base(fields, name, place, seen)


def _on_its_base(fields: dict[str, Any], name: str, place: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """The keys of a recipe's file over those of its base."""
    base = fields.pop("base", _DEFAULT)
    fields.setdefault("name", Path(name).stem)
    if not isinstance(base, str):
        raise UsageError(f"recipe {name}: base must be the name or path of a recipe, got {base!r}")
    return _override(_read(base, place, (*seen, name)), fields)


def _with_strata(fields: dict[str, Any], recipe: str) -> dict[str, Any]:
    """The keys with every stratum's ranges written out."""
    given = fields.get("strata")
    if not isinstance(given, dict):
        return fields
    strata: dict[str, Any] = {}
    for name, stratum in given.items():
        if isinstance(stratum, int | float) and not isinstance(stratum, bool):
            ranges = _read(str(name), Path(recipe).parent, ())["degradation"]
            strata[name] = {"share": stratum, "degradation": ranges}
        elif isinstance(stratum, dict):
            own = _override(fields["degradation"], stratum.get("degradation", {}))
            strata[name] = stratum | {"degradation": own}
        else:
            strata[name] = stratum  # refused by the model, by name
    return fields | {"strata": strata}


def _override(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _override(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
