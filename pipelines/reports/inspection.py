"""A dataset on one HTML page: pairs with their draws, how every parameter was drawn, severity, and what was left out.

The index is read by columns and batches, pictures by the ranges of the samples that are measured, so that a dataset of
any size takes the same memory.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from deedsr.dataset.keys import generator
from deedsr.dataset.recipe import Recipe
from deedsr.degradation.draws import parameter_limits, parameter_names, parameter_shares, parameter_step
from deedsr.degradation.kernels import KERNELS
from deedsr.metrics import psnr_y
from pipelines.data.dataset import Dataset
from pipelines.data.index import LeftOut, SampleIndex, left_out, require_hr
from pipelines.distribution import in_threads
from pipelines.reports.charts import Histogram, NamedCounts
from pipelines.reports.page import page_place, pair_view, write_page, yaml_text

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
    """Counts from one pass over the index: samples by split, stratum and group, and the parameters by step."""

    samples: int
    splits: Counter[str] = field(default_factory=Counter)
    strata: Counter[str | None] = field(default_factory=Counter)
    groups: Counter[int | None] = field(default_factory=Counter)
    steps: dict[str, list[Parameter]] = field(default_factory=dict)


def survey(
    dataset: Dataset, index: SampleIndex, progress: bool, beside: tuple[Dataset, SampleIndex] | None = None
) -> Survey:
    """Count the columns of the index in one pass.

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


MEASURED = 200  # samples whose severity is measured, besides those shown
READERS = 8  # samples read at a time
MAX_GROUPS = 12  # degradation groups with a row of their own
EXAMPLES = 4  # sources named for each reason


@dataclass
class InspectResult:
    """`samples`: in the dataset; `shown`: pairs on the page; `rejected`: sources."""

    page: str
    samples: int
    shown: int
    rejected: int


def inspect(
    uri: str, out: str | Path = "inspection.html", samples: int = 24, seed: int = 0, progress: bool = True
) -> InspectResult:
    """Write the page of the dataset at `uri` (folder or S3 prefix) to the location `out`, with `samples` pairs.

    `seed` chooses the pairs. Raises UsageError if `out` cannot be written, DeeDSRError if there is no finished dataset
    or it was damaged.
    """
    storage, _ = page_place(out)
    dataset = Dataset.open(uri).require_pixels("the page")
    require_hr(dataset)
    storage.require_writable()
    index = SampleIndex(dataset)
    rng = generator("inspect", seed)
    shown = choose_rows(index, samples, rng)
    measured = sorted({*shown, *choose_rows(index, MEASURED, rng)})
    found = survey(dataset, index, progress)
    pairs = read_pairs(dataset, index.rows(measured), {measured.index(row) for row in shown}, progress)
    write_page(
        out,
        "inspection.html",
        dataset=dataset,
        hr=dataset.hr_dataset() if dataset.manifest.hr_from else None,
        manifest=dataset.manifest,
        stored=sum(shard.bytes for shard in dataset.manifest.shards),
        found=found,
        pairs=[{**pair.view, "psnr": pair.psnr} for pair in pairs if pair.view],
        measured=len(pairs),
        severity=severity_histogram(pairs),
        strata=strata_rows(found, dataset.manifest.recipe.get("strata") or {}, pairs),
        groups=group_summary(found.groups),
        reasons=reasons(left_out(dataset)),
        recipe=yaml_text(dataset.manifest.recipe),
    )
    return InspectResult(str(out), dataset.manifest.samples, len(shown), dataset.manifest.rejected)


@dataclass(frozen=True)
class Pair:
    """A measured sample. `psnr`: dB on Y of its LR, enlarged bicubically; `view`: what the page shows, None if not."""

    stratum: str | None
    psnr: float
    view: Mapping[str, Any] | None


def read_pairs(dataset: Dataset, table: pa.Table, shown: set[int], progress: bool) -> list[Pair]:
    """Every row of `table`, measured; those in `shown` with what the page shows."""

    def column(name: str, row: int) -> Any:
        return table[name][row].as_py() if name in table.column_names else None

    def read(row: int) -> Pair:
        sample = dataset.read(table, row)
        enlarged = cv2.resize(sample.lr, sample.hr.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        psnr = psnr_y(enlarged, sample.hr)
        stratum, group = column(STRATUM, row), column(GROUP, row)
        if row not in shown:
            return Pair(stratum, psnr, None)
        tags = [column("split", row), stratum, None if group is None else f"group {group}"]
        return Pair(stratum, psnr, {**pair_view(sample), "tags": [tag for tag in tags if tag]})

    pairs = in_threads(read, range(table.num_rows), READERS)
    return list(tqdm(pairs, total=table.num_rows, unit="sample", desc="samples", disable=not progress))


def severity_histogram(pairs: Sequence[Pair]) -> Histogram:
    """Severity of the measured samples; the bins end at the least and the greatest."""
    psnr = np.array([pair.psnr for pair in pairs])
    severity = Histogram(None, (float(psnr.min()), float(psnr.max())) if len(psnr) else None)
    severity.add(psnr)
    return severity


def strata_rows(found: Survey, strata: Mapping[str, Mapping[str, Any]], pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Strata in the recipe's order, then others: samples, share, the recipe's share, mean severity; [] without any."""
    names: list[str | None] = [*strata, *sorted(name for name in found.strata if name and name not in strata)]
    if names and found.strata[None]:
        names.append(None)
    rows = []
    for name in names:
        psnr = [pair.psnr for pair in pairs if pair.stratum == name]
        rows.append(
            {
                "name": name or "none",
                "samples": found.strata[name],
                "share": found.strata[name] / found.samples,
                "expected": strata[name]["share"] if name is not None and name in strata else None,
                "psnr": float(np.mean(psnr)) if psnr else None,
                "measured": len(psnr),
            }
        )
    return rows


def group_summary(groups: Counter[int | None]) -> dict[str, Any] | None:
    """Sizes of the degradation groups, and each group if there are few; None without any."""
    sizes = {group: count for group, count in groups.items() if group is not None}
    if not sizes:
        return None
    counts = sorted(sizes.values())
    return {
        "groups": len(sizes),
        "samples": sum(counts),
        "none": groups[None],
        "smallest": counts[0],
        "median": counts[len(counts) // 2],
        "largest": counts[-1],
        "rows": sorted(sizes.items()) if len(sizes) <= MAX_GROUPS else [],
    }


def reasons(lines: Iterable[LeftOut]) -> dict[str, Any]:
    """Of sources and of crops: how many were left out, and the reasons, the most frequent first, each with how often it
    was and the first few sources."""
    found: dict[str, dict[str, Any]] = {"source": {}, "crop": {}}
    for kind, source, text in lines:
        reason = found.setdefault(kind, {}).setdefault(text, {"count": 0, "examples": []})
        reason["count"] += 1
        if len(reason["examples"]) < EXAMPLES and source not in reason["examples"]:
            reason["examples"].append(source)
    return {
        kind: {
            "count": sum(reason["count"] for reason in by_text.values()),
            "rows": sorted(by_text.items(), key=lambda item: -item[1]["count"]),
        }
        for kind, by_text in found.items()
    }
