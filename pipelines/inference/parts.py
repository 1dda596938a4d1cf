"""What an evaluation takes: samples of a dataset, or picture files that belong together by their names."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from deedsr.dataset.manifest import MANIFEST
from deedsr.errors import DatasetNotCommitted, UsageError
from pipelines.data.dataset import Dataset, no_validation
from pipelines.distribution import in_threads
from pipelines.shards.listing import list_pairs, list_sources, matched
from pipelines.shards.source import Source
from pipelines.storage import object_at, open_storage

MADE = ("model", "bicubic")  # methods that are computed here
_NAME = re.compile(r"[\w. -]+")  # of a method: what MLflow takes in names of metrics
_THREADS, _AHEAD = 16, 64


class Part(NamedTuple):
    """One picture to evaluate, in each version that is given: a row of a dataset's index, or files."""

    key: str  # names it in the output
    row: pa.Table | None = None
    files: Mapping[str, str] = {}  # locations: `lr`, `hr`, and by name of a method
    versions: tuple[str, ...] = ()  # of the files; change with their content


@dataclass(frozen=True)
class Given:
    """What is evaluated. `dataset`: of which the parts are rows; None for files."""

    parts: list[Part]
    uri: str
    digest: str  # of what the methods are compared on: LR and HR
    dataset: Dataset | None = None
    named: tuple[str, ...] = ()  # methods whose pictures are given
    rejected: dict[str, str] = field(default_factory=dict)  # reason by key
    has_lr: bool = True
    has_hr: bool = True


def dataset_given(data: str) -> Dataset | None:
    """The dataset at `data`, None for a folder of pictures."""
    if open_storage(data).exists(MANIFEST):
        return Dataset.open(data)
    if any(source.container for source in _listed(data)):
        raise DatasetNotCommitted(open_storage(data).uri)
    return None


def samples_given(dataset: Dataset, split: str, limit: int | None) -> Given:
    """Samples of a split, evenly spread where there are more than `limit`."""
    if split not in ("train", "validation"):
        raise UsageError(f"split must be train or validation, got {split!r}")
    table = dataset.index(split)
    if not table.num_rows:
        raise UsageError(
            f"{no_validation(dataset.uri, dataset.recipe)}; or evaluate on --split train"
            if split == "validation"
            else f"{dataset.uri} has no sample in its train split: take --split validation"
        )
    rows = [table.take([row]) for row in evenly(table.num_rows, limit)]
    return Given([Part(row["key"][0].as_py(), row) for row in rows], dataset.uri, dataset.digest, dataset)


def files_given(
    data: str | None, reference: str | None, pictures: Sequence[str], scale: int | None, limit: int | None
) -> Given:
    """Pictures of folders, matched by their names as `pipelines.shards.listing.list_pairs` does.

    Each picture of the references, else of `data`, else of the first of `pictures` is a part. One that lacks a
    partner is rejected. Raises UsageError for a folder without pictures, and for one of which no name fits.
    """
    folders = _named(pictures)
    first = next(iter(folders.items()), ("", ""))
    kind, place = ("hr", reference) if reference else ("lr", data) if data else first
    assert place
    if reference and data:
        sources = list(list_pairs([reference], [data], scale, "--data"))
    else:
        sources = _listed(place)
    _require_files(place, sources)
    found = {}
    for name, folder in folders.items():
        if name != kind:
            listed = _listed(folder)
            _require_files(folder, listed)
            found[name] = matched(sources, listed, None, "--pictures", folder)
    parts: dict[str, Part] = {}
    rejected = {}
    for source in sources:
        key = source.path.rpartition(".")[0]
        if key in parts or key in rejected:
            raise UsageError(f"{place} holds two pictures called {key}: rename or remove one")
        lacking = [name for name, partners in found.items() if source not in partners]
        if source.problem or lacking:
            rejected[key] = source.problem or f"no picture of {', '.join(lacking)}"
            continue
        files, versions = {kind: source.uri}, [f"{source.size}-{source.version}"]
        if source.lr:
            files["lr"] = source.lr
            versions.append(source.lr_version)
        for name, partners in found.items():
            files[name] = partners[source].uri
            versions.append(f"{partners[source].size}-{partners[source].version}")
        parts[key] = Part(key, None, files, tuple(versions))
    if not parts:
        reason = next(iter(rejected.values()))
        raise UsageError(f"no picture of {place} can be evaluated: {reason}, for each of {len(rejected)}")
    chosen = list(parts.values())
    chosen = [chosen[number] for number in evenly(len(chosen), limit)]
    uri = open_storage(place).uri
    return Given(
        chosen, uri, _digest(chosen), named=tuple(folders), rejected=rejected,
        has_lr=data is not None, has_hr=reference is not None,
    )  # fmt: skip


def evenly(count: int, wanted: int | None) -> list[int]:
    """At most `wanted` of the numbers below `count`, evenly spread."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [number * count // wanted for number in range(wanted)]


def _named(pictures: Sequence[str]) -> dict[str, str]:
    """Folders by name, of `NAME=FOLDER` or `FOLDER`, which is called as its last part."""
    folders: dict[str, str] = {}
    for given in pictures:
        name, equals, folder = given.partition("=")
        if not equals or "/" in name:
            name, folder = open_storage(given).uri.rpartition("/")[2], given
        if not folder or not _NAME.fullmatch(name) or name in ("lr", "hr", *MADE):
            raise UsageError(
                f"--pictures {given}: give NAME=FOLDER, with a name of letters, digits, '_', '-', '.' and spaces "
                f"that is none of lr, hr, {', '.join(MADE)}"
            )
        if name in folders:
            raise UsageError(f"--pictures gives {name} twice: name them apart by NAME=FOLDER")
        folders[name] = folder
    return folders


def _listed(folder: str) -> list[Source]:
    return list(list_sources([folder]))


def _require_files(folder: str, sources: Sequence[Source]) -> None:
    if container := next((source.container for source in sources if source.container), None):
        raise UsageError(f"{folder} holds {container}: give folders of pictures, unpacked")


def _digest(parts: Sequence[Part]) -> str:
    """Of the names of the parts, and the content of their LR and HR pictures."""
    places = [(part.key, part.files.get("lr"), part.files.get("hr")) for part in parts]
    hashes = in_threads(lambda place: [place[0], *map(_hash, place[1:])], places, _THREADS, _AHEAD)
    return hashlib.sha256(json.dumps(list(hashes)).encode()).hexdigest()


def _hash(uri: str | None) -> str | None:
    if uri is None:
        return None
    storage, name = object_at(uri)
    return hashlib.sha256(storage.read(name)).hexdigest()
