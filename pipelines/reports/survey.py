"""What the index of a dataset tells of its samples: their mix, and how every parameter of the degradation was drawn."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from deedsr.dataset.recipe import Recipe
from deedsr.degradation.kernels import KERNELS
from deedsr.degradation.limits import parameter_limits, parameter_names, parameter_shares, parameter_step
from pipelines.data.dataset import Dataset
from pipelines.data.index import SampleIndex
from pipelines.reports.histograms import Histogram, NamedCounts

_MAX_PARTS = 8  # of the index, from which samples are chosen: a part holds up to a million rows

# Optional columns of the index.
STRATUM, GROUP = "stratum", "degradation_group"

_STEPS = {
    "blur1": "First blur",
    "resize1": "First resize",
    "noise1": "First noise",
    "jpeg1": "First JPEG",
    "blur2": "Second blur",
    "resize2": "Second resize",
    "noise2": "Second noise",
    "resize3": "Last resize",
    "sinc": "Sinc filter",
    "jpeg2": "Last JPEG",
}
_PARAMETERS = {
    "kernel": "Kernel",
    "size": "Kernel size, px",
    "sigma_x": "σ along, px",
    "sigma_y": "σ across, px",
    "theta": "Angle, rad",
    "beta": "Shape β",
    "cutoff": "Cut-off, rad/px",
    "mode": "Mode",
    "factor": "Factor",
    "family": "Family",
    "sigma": "Gaussian σ, levels",
    "scale": "Poisson scale",
    "gray": "Channels",
    "quality": "Quality",
}
_WHOLE = {"deg_clean": "Clean or degraded", "deg_jpeg_last": "Order of the last step"}
# Isotropic kernels repeat one width and have no angle: their values would hide those that were drawn.
_ANISOTROPIC_ONLY = ("sigma_y", "theta")
_ANISOTROPIC = [number for number, kernel in enumerate(KERNELS) if kernel.endswith("anisotropic")]


@dataclass
class Parameter:
    """One `deg_*` column: what was drawn in how many samples."""

    column: str
    title: str
    drawn: Histogram | NamedCounts
    note: str = ""
    allowed: tuple[float, float] | None = None  # by this dataset's recipe

    @property
    def named(self) -> bool:
        return isinstance(self.drawn, NamedCounts)


@dataclass
class Survey:
    """What one pass over the index tells: samples by split, stratum and group, and the parameters by step."""

    samples: int
    splits: Counter[str] = field(default_factory=Counter)
    strata: Counter[str | None] = field(default_factory=Counter)
    groups: Counter[int | None] = field(default_factory=Counter)
    steps: dict[str, list[Parameter]] = field(default_factory=dict)


def survey(
    dataset: Dataset, index: SampleIndex, progress: bool, beside: tuple[Dataset, SampleIndex] | None = None
) -> Survey:
    """Count what the index says of every sample, in one pass.

    `beside`: another dataset, with which the histograms shall share their bins.
    """
    found = Survey(dataset.manifest.samples)
    counted: dict[str, Counter[Any]] = {"split": found.splits, STRATUM: found.strata, GROUP: found.groups}
    counted = {name: counts for name, counts in counted.items() if name in index.columns}
    found.steps = _parameters(dataset, index, beside)
    by_column = {one.column: one for step in found.steps.values() for one in step}
    with tqdm(total=found.samples, unit="row", desc="index", disable=not progress) as bar:
        for batch in index.batches([*counted, *by_column]):
            for name, counts in counted.items():
                for item in pa.compute.value_counts(batch[name]):
                    counts[item["values"].as_py()] += item["counts"].as_py()
            columns = {name: batch[name].to_numpy(zero_copy_only=False) for name in by_column}
            for name, parameter in by_column.items():
                step, _, short = name.removeprefix("deg_").partition("_")
                values = columns[name]
                if short in _ANISOTROPIC_ONLY:
                    values = values[np.isin(columns[f"deg_{step}_kernel"], _ANISOTROPIC)]
                parameter.drawn.add(values)
            bar.update(batch.num_rows)
    return found


def _limits(recipe: Recipe) -> dict[str, tuple[float, float]]:
    """A stratum has ranges of its own: the widest of all limit the whole."""
    each = [parameter_limits(stratum.degradation) for stratum in recipe.strata.values()]
    each = each or [parameter_limits(recipe.degradation)]
    return {name: (min(one[name][0] for one in each), max(one[name][1] for one in each)) for name in each[0]}


def _widest(*ranges: tuple[float, float] | None) -> tuple[float, float] | None:
    known = [one for one in ranges if one]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def _parameters(
    dataset: Dataset, index: SampleIndex, beside: tuple[Dataset, SampleIndex] | None
) -> dict[str, list[Parameter]]:
    """The columns of the degradation by step, in their order in the index, nothing counted yet."""
    recipe = dataset.recipe
    limits = _limits(recipe)
    others = _limits(beside[0].recipe) if beside else {}
    shares = {} if recipe.strata else parameter_shares(recipe.degradation)
    steps: dict[str, list[Parameter]] = {}
    for column in index.columns:
        if not column.startswith("deg_"):
            continue
        step, _, short = column.removeprefix("deg_").partition("_")
        title = _WHOLE.get(column) or _PARAMETERS.get(short, short)
        drawn: Histogram | NamedCounts
        if names := parameter_names(column):
            drawn = NamedCounts(names, shares.get(column, {}))
        else:
            extremes = index.extremes(column)
            if beside and column in beside[1].columns:
                extremes = _widest(extremes, beside[1].extremes(column))
            drawn = Histogram(_widest(limits.get(column), others.get(column)), extremes, parameter_step(column))
        note = "anisotropic kernels only" if short in _ANISOTROPIC_ONLY else ""
        steps.setdefault("Whole chain" if column in _WHOLE else _STEPS.get(step, step), []).append(
            Parameter(column, title, drawn, note, limits.get(column))
        )
    return steps


def choose_rows(index: SampleIndex, wanted: int, rng: np.random.Generator) -> list[int]:
    """Rows chosen by chance, spread over the dataset and evenly over its strata, if it has any; in rising order."""
    parts = sorted(spread_rows(np.arange(len(index.parts)), _MAX_PARTS, rng))
    rows = np.concatenate([np.arange(index.parts[part].start, index.parts[part].stop) for part in parts])
    strata = _of_strata(index, parts, rows) if STRATUM in index.columns else [rows]
    chosen: list[int] = []
    for number, candidates in enumerate(strata):  # the smallest first: what it lacks, the others give
        chosen += spread_rows(candidates, -(-(wanted - len(chosen)) // (len(strata) - number)), rng)
    return sorted(chosen)


def _of_strata(index: SampleIndex, parts: list[int], rows: np.ndarray) -> list[np.ndarray]:
    """The rows of each stratum, the smallest one first."""
    numbers: dict[str | None, int] = {}
    codes = []
    for batch in index.batches([STRATUM], parts):
        names = batch[STRATUM].dictionary_encode(null_encoding="encode")
        known = [numbers.setdefault(name, len(numbers)) for name in names.dictionary.to_pylist()]
        codes.append(np.array(known, np.int32)[names.indices])
    strata = np.concatenate(codes)
    return sorted((rows[strata == number] for number in numbers.values()), key=len)


def spread_rows(numbers: np.ndarray, wanted: int, rng: np.random.Generator) -> list[int]:
    """At most `wanted` of the numbers, one by chance from each of as many equal stretches."""
    count = min(wanted, len(numbers))
    edges = np.arange(count + 1) * len(numbers) // max(1, count)  # whole numbers: no two stretches share one
    return [int(n) for n in numbers[rng.integers(edges[:-1], edges[1:])]]
