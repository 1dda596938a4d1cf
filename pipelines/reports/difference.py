"""What regenerating changed: two datasets on one HTML page, by samples, sources, drawn parameters and recipe; and the
same in one picture, for MLflow.

Both indexes are read by columns, batch by batch. Of each sample 41 bytes are held: its split, and hashes (64 bits) of
its key, its source, the source's content, and of what its HR and its LR follow from.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm import tqdm

from deedsr.dataset.keys import generator
from deedsr.errors import DeeDSRError
from pipelines import tracking
from pipelines.data.dataset import Dataset, Sample
from pipelines.data.index import SampleIndex, require_hr
from pipelines.reports.charts import Histogram, NamedCounts
from pipelines.reports.inspection import Parameter, Survey, spread_rows, survey
from pipelines.reports.page import caption, page_place, pair_view, write_page
from pipelines.tracking.provenance import flatten
from pipelines.tracking.store import sqlite_path

logger = logging.getLogger(__name__)
EXAMPLES = 4  # sources and keys named of each kind
CHECKED = 64  # samples that are the same by the index and lie in another tar: their bytes are compared
SHOWN_IN_MLFLOW = 4  # pictures, and parameters
_SIDE = 256  # px of each
# What determines the bytes of a sample's images, as far as the index records it: the recipe's formats, and what was
# drawn. The stored sizes also show other causes, such as another version of a library.
_HR = ("source_sha256", "top", "left", "height", "width", "flip", "rotate", "hr_ext", "hr_size")
_LR = ("stratum", "degradation_group", "lr_ext", "lr_size")


@dataclass
class DifferenceResult:
    """`samples`, `changed`, `sources`: counts; `recipe`: by dotted key [old, new]; `parameters`: by column the share of
    the samples that would have to get another value (total variation), and the means; `unequal_bytes`: of
    `checked` samples that are the same by the index; `run_id`: of the MLflow run that got the picture."""

    page: str
    samples: dict[str, int]
    changed: dict[str, int]
    sources: dict[str, int]
    recipe: dict[str, list[Any]]
    parameters: dict[str, dict[str, float | None]]
    checked: int
    unequal_bytes: int
    shown: int
    run_id: str | None


def inspect_against(
    uri: str,
    against: str,
    out: str | Path = "inspection.html",
    samples: int = 24,
    seed: int = 0,
    progress: bool = True,
    log: bool = True,
) -> DifferenceResult:
    """Write the page that compares the dataset at `uri` with the older one at `against`; `samples` sources are shown.

    `log`: the MLflow run that made the dataset, if there is one, gets the page as a picture. Errors as of `inspect`.
    """
    storage, _ = page_place(out)
    new, old = (Dataset.open(place).require_pixels("the page") for place in (uri, against))
    for dataset in (new, old):
        require_hr(dataset)
    storage.require_writable()
    indexes = SampleIndex(new), SampleIndex(old)
    prints = [fingerprints(*one, progress) for one in zip((new, old), indexes, strict=True)]
    found = compare_samples(prints[0], prints[1])
    surveys = (
        survey(new, indexes[0], progress, beside=(old, indexes[1])),
        survey(old, indexes[1], progress, beside=(new, indexes[0])),
    )
    shifts = parameter_shifts(*surveys)
    rng = generator("inspect", seed)
    checked, unequal = _unequal_bytes(new, old, indexes, found, rng)
    rows = _shown(found, prints, samples, rng)
    shown = list(zip(_read(new, indexes[0], rows[:, 0]), _read(old, indexes[1], rows[:, 1]), strict=True))
    recipe = _differing(flatten(old.manifest.recipe), flatten(new.manifest.recipe))
    made_by = [{"deedsr": dataset.manifest.created_by, **dataset.manifest.libraries} for dataset in (old, new)]

    def examples(kind: str, rows: np.ndarray) -> list[str]:
        sources = indexes[kind == "gone"].rows(rows[:EXAMPLES].tolist(), ["source"]) if len(rows) else None
        return list(dict.fromkeys(sources["source"].to_pylist())) if sources else []

    write_page(
        out,
        "difference.html",
        new=new,
        old=old,
        found=found,
        sources={kind: {"count": len(rows), "examples": examples(kind, rows)} for kind, rows in found.sources.items()},
        recipe={key: [_value(value) for value in pair] for key, pair in recipe.items()},
        libraries=_differing(made_by[0], made_by[1], missing="–"),
        steps={title: moved for title, steps in shifts.items() if (moved := [one for one in steps if one.moved])},
        unmoved=[f"{title}: {one.new.title}" for title, steps in shifts.items() for one in steps if not one.moved],
        checked=checked,
        unequal=unequal,
        pairs=[_pair_view(*pair) for pair in shown],
        same_keys=len(found.pairs) > 0,
    )
    run_id = _logged(new, old, found, shifts, shown) if log else None
    return DifferenceResult(
        page=str(out),
        samples={"new": len(prints[0].key), "old": len(prints[1].key), **found.counts},
        changed={name: int(np.count_nonzero(getattr(found, name))) for name in ("hr", "lr", "split")},
        sources={kind: len(rows) for kind, rows in found.sources.items()},
        recipe={key: list(pair) for key, pair in recipe.items()},
        parameters={one.new.column: one.figures() for steps in shifts.values() for one in steps},
        checked=checked,
        unequal_bytes=unequal,
        shown=len(shown),
        run_id=run_id,
    )


@dataclass(frozen=True)
class Fingerprints:
    """64 bits of each sample, in the order of the index: equal ones stand for equal values."""

    key: np.ndarray
    source: np.ndarray  # path below its `--source`
    content: np.ndarray  # of the source
    hr: np.ndarray
    lr: np.ndarray
    validation: np.ndarray  # bool


def fingerprints(dataset: Dataset, index: SampleIndex, progress: bool) -> Fingerprints:
    """One pass over the columns that identify a sample."""
    drawn = [name for name in index.columns if name.startswith("deg_")]
    facets = {
        "key": ["key"],
        "source": ["root", "source"],
        "content": ["source_sha256"],
        "hr": [name for name in _HR if name in index.columns],
        "lr": [*(name for name in _LR if name in index.columns), *drawn],
    }
    columns = sorted({name for names in facets.values() for name in names} | {"split"})
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*facets, "validation")}
    with tqdm(total=dataset.manifest.samples, unit="row", desc="compare", disable=not progress) as bar:
        for batch in index.batches(columns):
            for facet, names in facets.items():
                parts[facet].append(_hashes(batch.select(names)))
            parts["validation"].append(np.array(batch["split"].to_numpy(zero_copy_only=False) == "validation"))
            bar.update(batch.num_rows)
    return Fingerprints(**{name: np.concatenate(found) for name, found in parts.items()})


def _hashes(rows: pa.RecordBatch) -> np.ndarray:
    """64 bits of each row; numbers of every type count by their value."""
    texts = {name for name in rows.schema.names if pa.types.is_string(rows[name].type)}
    columns = {
        name: column.to_pandas() if name in texts else column.cast(pa.float64()).to_pandas() + 0.0  # no negative zero
        for name, column in zip(rows.schema.names, rows.columns, strict=True)
    }
    return pd.util.hash_pandas_object(pd.DataFrame(columns), index=False).to_numpy()


@dataclass(frozen=True)
class Difference:
    """Rows of the new index, of the old one for `gone`. `pairs`: (new, old) rows of the samples with one key.

    `hr`, `lr`, `split`: which of these pairs differ in it, bool.
    """

    added: np.ndarray
    gone: np.ndarray
    pairs: np.ndarray  # (n, 2)
    hr: np.ndarray
    lr: np.ndarray
    split: np.ndarray
    sources: dict[str, np.ndarray]  # added, changed, gone: a row of each source

    @property
    def counts(self) -> dict[str, int]:
        changed = int(np.count_nonzero(self.hr | self.lr | self.split))
        counts = {"same": len(self.pairs) - changed, "changed": changed}
        return counts | {"added": len(self.added), "gone": len(self.gone)}


def compare_samples(new: Fingerprints, old: Fingerprints) -> Difference:
    """Samples are the same if their keys are, which no regeneration changes for the same source and crop."""
    there = _found(new.key, old.key)
    rows = np.flatnonzero(there >= 0)
    pairs = np.stack([rows, there[rows]], axis=1)
    differs = lambda facet: getattr(new, facet)[pairs[:, 0]] != getattr(old, facet)[pairs[:, 1]]
    return Difference(
        added=np.flatnonzero(there < 0),
        gone=np.flatnonzero(_found(old.key, new.key) < 0),
        pairs=pairs,
        hr=differs("hr"),
        lr=differs("lr"),
        split=differs("validation"),
        sources=_sources(new, old),
    )


def _found(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For each the row that holds it, -1 for none."""
    if not len(among):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(among, kind="stable")
    places = np.searchsorted(among, wanted, sorter=order).clip(0, len(among) - 1)
    rows = order[places]
    return np.where(among[rows] == wanted, rows, -1)


def _sources(new: Fingerprints, old: Fingerprints) -> dict[str, np.ndarray]:
    """A row of each source: by path, and by content where the path is in both."""
    _, first_new = np.unique(new.source, return_index=True)
    _, first_old = np.unique(old.source, return_index=True)
    there = _found(new.source[first_new], old.source[first_old])
    both = there >= 0
    same = new.content[first_new[both]] == old.content[first_old[there[both]]]
    return {
        "added": np.sort(first_new[~both]),
        "changed": np.sort(first_new[both][~same]),
        "gone": np.sort(first_old[_found(old.source[first_old], new.source[first_new]) < 0]),
    }


@dataclass(frozen=True)
class Shift:
    """One parameter in both datasets. `share`: of the samples that would have to get another value, 0 to 1."""

    new: Parameter
    old: Parameter
    share: float
    shares: tuple[np.ndarray, np.ndarray]  # of the samples in each bin or behind each name, new and old

    def figures(self) -> dict[str, float | None]:
        drawn = {"mean": self.new.drawn, "mean_before": self.old.drawn}
        means = {name: one.mean if isinstance(one, Histogram) and one.total else None for name, one in drawn.items()}
        return {"moved": round(self.share, 6), **means}

    @property
    def moved(self) -> bool:
        """Whether it shows, in per cent with a digit behind the point."""
        return self.share >= 0.0005

    @property
    def highest(self) -> float:
        return max(1e-9, *(float(shares.max()) for shares in self.shares))

    def outline(self) -> str:
        """The old histogram as an SVG path, over bins one unit wide, 100 units high."""
        heights = 100 - 100 * self.shares[1] / self.highest
        return "M0,100" + "".join(f"V{height:.1f}h1" for height in heights) + "V100"

    def bars(self) -> list[tuple[int, float, str]]:
        """(bin, height of 100, text) of the new histogram."""
        drawn = self.new.drawn
        assert isinstance(drawn, Histogram)
        texts = [f"{100 * old:.2g} % before, {100 * new:.2g} % now" for new, old in zip(*self.shares, strict=True)]
        heights = 100 * self.shares[0] / self.highest
        return [(number, float(height), texts[number]) for number, height in enumerate(heights) if height]

    def named(self) -> list[tuple[str, float, float]]:
        """(name, new share, old share) of what was drawn in either."""
        drawn = self.new.drawn
        assert isinstance(drawn, NamedCounts)
        rows = zip([*drawn.names, "unknown"], *self.shares, strict=True)
        return [(name, float(new), float(old)) for name, new, old in rows if new or old]


def parameter_shifts(new: Survey, old: Survey) -> dict[str, list[Shift]]:
    """Every parameter of both, by step."""
    before = {one.column: one for steps in old.steps.values() for one in steps}

    def shift(now: Parameter) -> Shift:
        shares = now.drawn.counts / new.samples, before[now.column].drawn.counts / old.samples
        missing = abs(shares[0].sum() - shares[1].sum())  # in one of both it is drawn less often
        share = (float(np.abs(shares[0] - shares[1]).sum()) + missing) / 2
        return Shift(now, before[now.column], share, shares)

    return {title: [shift(one) for one in steps if one.column in before] for title, steps in new.steps.items()}


def _shown(found: Difference, prints: Sequence[Any], wanted: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 2): rows of the same sample in both, changed ones if there are any; else of the same source."""
    pairs = found.pairs[found.hr | found.lr]
    pairs = pairs if len(pairs) else found.pairs
    if not len(pairs):
        _, *rows = np.intersect1d(prints[0].source, prints[1].source, return_indices=True)
        pairs = np.stack(rows, axis=1)
    return pairs[spread_rows(np.arange(len(pairs)), wanted, rng)] if len(pairs) else pairs


def _read(dataset: Dataset, index: SampleIndex, rows: np.ndarray) -> list[Sample]:
    """The samples of some rows, in this order."""
    if not len(rows):
        return []
    rising = sorted({int(row) for row in rows})
    table = index.rows(rising)
    places = {row: place for place, row in enumerate(rising)}
    return [dataset.read(table, places[int(row)]) for row in rows]


def _unequal_bytes(
    new: Dataset, old: Dataset, indexes: tuple[SampleIndex, SampleIndex], found: Difference, rng: np.random.Generator
) -> tuple[int, int]:
    """(compared, unequal): images of samples that are the same by the index, as they come out of the tars."""
    pairs = found.pairs[~(found.hr | found.lr)]
    pairs = pairs[spread_rows(np.arange(len(pairs)), CHECKED, rng)] if len(pairs) else pairs
    both = zip(_read(new, indexes[0], pairs[:, 0]), _read(old, indexes[1], pairs[:, 1]), strict=True)
    unequal = sum(not (np.array_equal(a.hr, b.hr) and np.array_equal(a.lr, b.lr)) for a, b in both)
    return len(pairs), unequal


def _pair_view(new: Sample, old: Sample) -> dict[str, Any]:
    now, before = pair_view(new), pair_view(old)
    same_hr = np.array_equal(new.hr, old.hr)
    versions = [
        {"label": "LR before", "src": before["lr"], "coarse": True},
        {"label": "LR now", "src": now["lr"], "coarse": True},
        {"label": "HR" if same_hr else "HR now", "src": now["hr"], "coarse": False},
    ]
    if not same_hr:
        versions.insert(2, {"label": "HR before", "src": before["hr"], "coarse": False})
    return {**now, "versions": versions, "before": before}


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], missing: Any = None) -> dict[str, tuple[Any, Any]]:
    """Keys with another value: (old, new), `missing` where there is no such key."""
    values = {key: (old.get(key, missing), new.get(key, missing)) for key in {**old, **new}}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def _value(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _logged(
    new: Dataset,
    old: Dataset,
    found: Difference,
    shifts: dict[str, list[Shift]],
    shown: Sequence[tuple[Sample, Sample]],
) -> str | None:
    """Id of the run of `deedsr shards` that made the dataset, which gets the picture; None if there is none."""
    try:
        uri = tracking.tracking_uri()
        if (store := sqlite_path(uri)) and not store.exists():
            return None
        run_id = tracking.find_run(None, {"deedsr.kind": "shards", "deedsr.dataset.digest": new.digest}, uri)
        if run_id:
            picture = difference_picture(found, shifts, shown)
            tracking.Run(uri, run_id).log_picture(f"against-{old.digest[:12]}", picture)
        return run_id
    except DeeDSRError as error:
        logger.warning("%s; the page is written, its picture is not in MLflow", error)
        return None


def difference_picture(
    found: Difference, shifts: dict[str, list[Shift]], shown: Sequence[tuple[Sample, Sample]]
) -> np.ndarray:
    """uint8 RGB: the counts, sources under both (LR before, LR now, HR now), and the parameters that moved most."""
    counts = "   ".join(f"{name} {count:,}" for name, count in found.counts.items())
    rows = [caption(counts, 3 * _SIDE), caption("LR before, LR now, HR now", 3 * _SIDE)]
    for new, old in shown[:SHOWN_IN_MLFLOW]:
        squares = [cv2.resize(one, (_SIDE, _SIDE), interpolation=cv2.INTER_NEAREST) for one in (old.lr, new.lr)]
        rows.append(np.hstack([*squares, cv2.resize(new.hr, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)]))
    every = [(title, one) for title, steps in shifts.items() for one in steps]
    for title, one in sorted(every, key=lambda item: -item[1].share)[:SHOWN_IN_MLFLOW]:
        rows += [
            caption(f"{title}, {one.new.column}: {100 * one.share:.1f} % moved", 3 * _SIDE),
            _chart(one, 3 * _SIDE),
        ]
    return np.vstack(rows)


def _chart(one: Shift, width: int, height: int = 80) -> np.ndarray:
    """New shares as bars, old ones as a line above them."""
    image = np.full((height, width, 3), 255, np.uint8)
    edges = np.linspace(8, width - 8, len(one.shares[0]) + 1).astype(int)
    for shares, colour, thickness in ((one.shares[0], (31, 111, 139), -1), (one.shares[1], (179, 67, 15), 2)):
        tops = (height - 4 - (height - 8) * shares / one.highest).astype(int)
        for left, right, top in zip(edges[:-1], edges[1:], tops, strict=True):
            if thickness < 0:
                cv2.rectangle(image, (int(left), int(top)), (int(right) - 1, height - 4), colour, thickness)
            else:
                cv2.line(image, (int(left), int(top)), (int(right) - 1, int(top)), colour, thickness)
    return image
