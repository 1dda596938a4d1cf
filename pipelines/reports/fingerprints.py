"""What regenerating changed: two datasets compared by samples, sources, drawn parameters and recipe.

Both indexes are read by columns, batch by batch. Of each sample 41 bytes are held: its split, and hashes (64 bits) of
its key, its source, the source's content, and of what its HR and its LR follow from.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pipelines.data.dataset import Dataset
from pipelines.data.index import SampleIndex
from pipelines.tracking.provenance import flatten

# What determines the bytes of a sample's images, as far as the index records it: the recipe's formats, and what was
# drawn. The stored sizes also show other causes, such as another version of a library.
_HR = ("source_sha256", "top", "left", "height", "width", "flip", "rotate", "hr_ext", "hr_size")
_LR = ("stratum", "degradation_group", "lr_ext", "lr_size")
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_NULL = np.uint64(0xD6E8FEB86659FD93)


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
                total = np.zeros(batch.num_rows, np.uint64)
                for name in names:
                    total = _mixed(total, _bits(batch[name]))
                parts[facet].append(total)
            parts["validation"].append(np.array(batch["split"].to_numpy(zero_copy_only=False) == "validation"))
            bar.update(batch.num_rows)
    return Fingerprints(**{name: np.concatenate(found) for name, found in parts.items()})


def _bits(column: pa.Array) -> np.ndarray:
    """64 bits of each value; those of texts are a hash."""
    if pa.types.is_string(column.type):
        encoded = column.dictionary_encode()
        hashes = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in encoded.dictionary.to_pylist()]
        known = np.frombuffer(b"".join(hashes), np.uint64) if hashes else np.zeros(1, np.uint64)
        bits = known[encoded.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)]
    else:
        numbers = column.cast(pa.float64()).fill_null(0.0).to_numpy(zero_copy_only=False)
        bits = (numbers + 0.0).view(np.uint64)  # no negative zero
    nulls = column.is_null().to_numpy(zero_copy_only=False)
    return np.where(nulls, _NULL, bits)


def _mixed(total: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Both in one, by the finalizer of splitmix64."""
    mixed = (total * np.uint64(31) + bits + _PRIME).astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


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
