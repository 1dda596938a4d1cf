"""A dataset on one HTML page: pairs with their draws, how every parameter was drawn, severity, and what was left out.

The index is read by columns and batches, pictures by the ranges of the samples that are measured, so that a dataset of
any size takes the same memory.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from deedsr.dataset.keys import generator
from deedsr.metrics import psnr_y
from pipelines.data.dataset import Dataset, Sample
from pipelines.data.index import LeftOut, SampleIndex, left_out, require_hr
from pipelines.reports.histograms import Histogram
from pipelines.reports.page import data_uri, page_place, write_page
from pipelines.reports.report import describe_degradation, yaml_text
from pipelines.reports.survey import GROUP, STRATUM, Survey, choose_rows, survey

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


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


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

    with ThreadPoolExecutor(READERS) as threads:
        pairs = threads.map(read, range(table.num_rows))
        return list(tqdm(pairs, total=table.num_rows, unit="sample", desc="samples", disable=not progress))


def pair_view(sample: Sample) -> dict[str, Any]:
    """One pair as the template shows it."""
    height, width = sample.hr.shape[:2]
    # Pairs of two photographs were degraded by the world, not by a chain.
    draws = sample.info.get("degradation") or {"steps": [], "clean": False}
    return {
        "key": sample.key,
        "title": f"sample {sample.key}",
        "width": width,
        "height": height,
        "hr": data_uri(sample.hr),
        "lr": data_uri(sample.lr, lossless=True),
        "lr_size": sample.lr.shape[1::-1],
        "source": sample.info["source"]["path"],
        "crop": sample.info["crop"],
        "flip": sample.info["flip"],
        "steps": describe_degradation(draws),
        "clean": draws["clean"],
    }


def severity_histogram(pairs: Sequence[Pair]) -> Histogram:
    """Severity of the measured samples; the bins end at the least and the greatest."""
    psnr = np.array([pair.psnr for pair in pairs])
    severity = Histogram(None, (float(psnr.min()), float(psnr.max())) if len(psnr) else None)
    severity.add(psnr)
    return severity


# ---------------------------------------------------------------------------------------------------------------------
# Tables


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
    """How many samples share a degradation group, and the groups one by one if they are few; None without any."""
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


@dataclass
class Reason:
    """How often something was left out for one reason, and the first few sources."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


def reasons(lines: Iterable[LeftOut]) -> dict[str, Any]:
    """Of sources and of crops: how many were left out, and the reasons, the most frequent first."""
    found: dict[str, dict[str, Reason]] = {"source": {}, "crop": {}}
    for kind, source, text in lines:
        reason = found.setdefault(kind, {}).setdefault(text, Reason())
        reason.count += 1
        if len(reason.examples) < EXAMPLES and source not in reason.examples:
            reason.examples.append(source)
    return {
        kind: {
            "count": sum(reason.count for reason in by_text.values()),
            "rows": sorted(by_text.items(), key=lambda item: -item[1].count),
        }
        for kind, by_text in found.items()
    }
