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
_THREADS = 16


class Part(NamedTuple):
    """One picture to evaluate, in each version that is given: a row of a dataset's index, files, or both."""

    key: str  # names it in the output
    row: pa.Table | None = None
    files: Mapping[str, str] = {}  # locations: `lr`, `hr`, and by name of a method
    versions: tuple[str, ...] = ()  # of the files; change with their content


@dataclass(frozen=True)
class Given:
    """What is evaluated."""

    parts: list[Part]
    uri: str
    digest: str  # of what the methods are compared on: LR and HR
    named: tuple[str, ...] = ()  # methods whose pictures are given
    rejected: dict[str, str] = field(default_factory=dict)  # reason by key
    has_lr: bool = True
    has_hr: bool = True


def dataset_given(data: str) -> Dataset | None:
    """The dataset at `data`, None for a folder of pictures."""
    if open_storage(data).exists(MANIFEST):
        return Dataset.open(data)
    if any(source.container for source in list_sources([data])):
        raise DatasetNotCommitted(open_storage(data).uri)
    return None


def samples_given(dataset: Dataset, split: str, pictures: Sequence[str], limit: int | None) -> Given:
    """Samples of a split, evenly spread where there are more than `limit`, with the pictures that their keys name.

    A sample that lacks one is rejected.
    """
    table = dataset.index(split)
    if not table.num_rows:
        raise UsageError(
            f"{no_validation(dataset.uri, dataset.recipe)}; or evaluate on --split train"
            if split == "validation"
            else f"{dataset.uri} has no sample in its train split: take --split validation"
        )
    keys = table["key"].to_pylist()
    rows = {key: row for row, key in enumerate(keys)}
    sources = [Source(0, f"{key}.png", f"{dataset.uri}/{key}", 0, "") for key in keys]
    folders = _named(pictures)
    parts, rejected = _matched_parts(dataset.uri, sources, "", folders, limit)
    parts = [part._replace(row=table.take([rows[part.key]])) for part in parts]
    return Given(parts, dataset.uri, dataset.digest, tuple(folders), rejected)


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
        _require_files(place, sources)
    else:
        sources = _listed(place)
    parts, rejected = _matched_parts(place, sources, kind, folders, limit)
    uri = open_storage(place).uri
    return Given(
        parts, uri, _digest(parts), named=tuple(folders), rejected=rejected,
        has_lr=data is not None, has_hr=reference is not None,
    )  # fmt: skip


def _matched_parts(
    place: str, sources: Sequence[Source], kind: str, folders: Mapping[str, str], limit: int | None
) -> tuple[list[Part], dict[str, str]]:
    """Parts of `sources` that each folder has a picture of, at most `limit`; the others' keys and why.

    `kind`: which files of a part the sources are; "" = none, they are samples. The marks of test sets are left out of
    names on both sides: any folder may hold LR-named results.
    """
    found = {
        name: matched(list(sources), _listed(folder), None, "--pictures", folder, versions=True)
        for name, folder in folders.items()
        if name != kind
    }
    parts: dict[str, Part] = {}
    rejected: dict[str, str] = {}
    for source in sources:
        key = source.path.rpartition(".")[0]
        if key in parts or key in rejected:
            raise UsageError(f"{place} holds two pictures called {key}: rename or remove one")
        lacking = [name for name, partners in found.items() if source not in partners]
        if source.problem or lacking:
            rejected[key] = source.problem or f"no picture of {', '.join(lacking)}"
            continue
        given = ({kind: source} if kind else {}) | {name: partners[source] for name, partners in found.items()}
        files = {name: one.uri for name, one in given.items()}
        versions = [f"{one.size}-{one.version}" for one in given.values()]
        if source.lr:
            files["lr"] = source.lr
            versions.append(source.lr_version)
        parts[key] = Part(key, None, files, tuple(versions))
    if not parts:
        reason = next(iter(rejected.values()))
        raise UsageError(f"no picture of {place} can be evaluated: {reason}, for each of {len(rejected)}")
    chosen = list(parts.values())
    return [chosen[number] for number in evenly(len(chosen), limit)], rejected


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
    sources = list(list_sources([folder]))
    _require_files(folder, sources)
    return sources


def _require_files(folder: str, sources: Sequence[Source]) -> None:
    if container := next((source.container for source in sources if source.container), None):
        raise UsageError(f"{folder} holds {container}: give folders of pictures, unpacked")


def _digest(parts: Sequence[Part]) -> str:
    """Of the names of the parts, and the content of their LR and HR pictures."""
    places = [(part.key, part.files.get("lr"), part.files.get("hr")) for part in parts]
    hashes = in_threads(lambda place: [place[0], *map(_hash, place[1:])], places, _THREADS)
    return hashlib.sha256(json.dumps(list(hashes)).encode()).hexdigest()


def _hash(uri: str | None) -> str | None:
    if uri is None:
        return None
    storage, name = object_at(uri)
    return hashlib.sha256(storage.read(name)).hexdigest()
