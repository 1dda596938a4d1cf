"""What regenerating changed: two datasets compared by samples, sources, drawn parameters and recipe.

Both indexes are read by columns, batch by batch. Of each sample 41 bytes are held: its split, and hashes (64 bits) of
its key, its source, the source's content, and of what its HR and its LR follow from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm import tqdm

from pipelines.data.dataset import Dataset
from pipelines.data.index import SampleIndex
from pipelines.tracking.provenance import flatten

# What determines the bytes of a sample's images, as far as the index records it: the recipe's formats, and what was
# drawn. The stored sizes also show other causes, such as another version of a library.
_HR = ("source_sha256", "top", "left", "height", "width", "flip", "rotate", "hr_ext", "hr_size")
_LR = ("stratum", "degradation_group", "lr_ext", "lr_size")


@dataclass(frozen=True)
class Fingerprints:
    """64 bits of each sample, in the order of the index: equal ones stand for equal values."""

    key: np.ndarray
    source: np.ndarray  # path below its `--source`
    content: np.ndarray  # of the source
    hr: np.ndarray
    lr: np.ndarray
    validation: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.key)


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
    def changed(self) -> np.ndarray:
        return self.hr | self.lr | self.split

    @property
    def counts(self) -> dict[str, int]:
        changed = int(np.count_nonzero(self.changed))
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


def same_sources(new: Fingerprints, old: Fingerprints) -> np.ndarray:
    """(n, 2): a row in new and old for each source that is in both."""
    _, *rows = np.intersect1d(new.source, old.source, return_indices=True)
    return np.stack(rows, axis=1)


def recipe_difference(new: Dataset, old: Dataset) -> dict[str, tuple[Any, Any]]:
    """Keys of the recipes with another value: dotted, with (old, new); None where a recipe lacks the key."""
    flat_new, flat_old = (flatten(dataset.manifest.recipe) for dataset in (new, old))
    keys = [*flat_old, *(key for key in flat_new if key not in flat_old)]
    values = {key: (flat_old.get(key), flat_new.get(key)) for key in keys}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def names(index: SampleIndex, rows: Sequence[int], column: str) -> list[str]:
    """A column of a few rows, each value once."""
    return list(dict.fromkeys(index.rows(rows, [column])[column].to_pylist())) if len(rows) else []
