"""What a `--source` holds: the pictures below a folder or S3 prefix, or those that a list file names."""

import os
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from deedsr.errors import DeeDSRError, UsageError
from pipelines.storage import Entry, open_storage

__all__ = ["Source", "list_sources", "read_source", "split_uri"]

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")


class Source(NamedTuple):
    """One picture. `root` is the ordinal of its `--source`, `path` its name below it: what a sample is named after."""

    root: int
    path: str
    uri: str  # where it lies now
    size: int  # bytes
    version: str  # changes with the content: modification time or ETag
    container: str = ""  # relative path of the file that holds it, where `uri` names a tar or a Parquet table
    offset: int = -1  # of its first byte in a tar
    row: int = -1  # in a Parquet table
    duplicate: bool = False  # another source with the same content comes first
    lr: str = ""  # where its real LR partner lies
    lr_version: str = ""  # size and version of that


def list_sources(uris: Sequence[str]) -> Iterator[Source]:
    """Every picture of every `--source`. Raises UsageError for one that does not exist or holds none."""
    if not uris:
        raise UsageError("no source: give --source a folder, a list file (.txt) or an S3 prefix")
    for root, uri in enumerate(uris):
        yield from _list_file(root, uri) if uri.lower().endswith(".txt") else _folder(root, uri)


def split_uri(uri: str) -> tuple[str, str]:
    """Folder and name of one object."""
    folder, _, name = uri.rpartition("/")
    return folder or ("/" if uri.startswith("/") else "."), name


def _folder(root: int, uri: str) -> Iterator[Source]:
    storage = open_storage(uri)
    local = storage.local_path("")
    if local is not None and not local.exists():
        raise UsageError(f"source {storage.uri} does not exist")
    if local is not None and not local.is_dir():
        raise UsageError(
            f"source {storage.uri} is a file: give the folder it is in, or a list file (.txt) that names it"
        )
    empty = True
    for entry in storage.list():
        if entry.path.lower().endswith(_EXTENSIONS):
            yield Source(root, entry.path, posixpath.join(storage.uri, entry.path), entry.size, entry.version)
            empty = False
    if empty:
        raise UsageError(f"source {storage.uri} holds no pictures ({', '.join(_EXTENSIONS)})")


def _list_file(root: int, uri: str) -> list[Source]:
    """Lines are relative to the list's folder, and name their sources as they are.

    If one is absolute or leads out of that folder, every source is named by its part below the common folder of all.
    """
    folder, name = split_uri(uri)
    storage = open_storage(folder)
    try:
        text = storage.read(name).decode()
    except FileNotFoundError:
        raise UsageError(f"source {uri} does not exist") from None
    except (UnicodeDecodeError, DeeDSRError) as error:
        raise UsageError(f"source {uri} is not a list file with one path or URI a line ({error})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"source {uri} names no pictures: write one path or URI a line")
    absolute = [line.startswith("/") or "://" in line for line in lines]
    places = [
        open_storage(line).uri if is_absolute else storage.child(line).uri
        for line, is_absolute in zip(lines, absolute, strict=True)
    ]
    if len({place.startswith("s3://") for place in places}) > 1:
        raise UsageError(f"source {uri} mixes local files and S3 objects: write one list for each")
    places = sorted(set(places))
    parts = [place.split("/") for place in places]
    common = storage.uri.rstrip("/").split("/")
    if any(absolute) or any(part[: len(common)] != common for part in parts):
        common = list(os.path.commonprefix([part[:-1] for part in parts]))
    paths = ["/".join(part[len(common) :]) for part in parts]
    with ThreadPoolExecutor(16) as threads:
        entries = threads.map(_stat, places)
        return [
            Source(root, path, place, entry.size, entry.version)
            for path, place, entry in zip(paths, places, entries, strict=True)
        ]


def _stat(uri: str) -> Entry:
    folder, name = split_uri(uri)
    try:
        return open_storage(folder).stat(name)
    except FileNotFoundError:
        return Entry(name, 0, "")  # reading it will say so, and it is recorded as rejected


def read_source(source: Source) -> tuple[bytes, bytes | None]:
    """The picture and its real LR partner, if it has one. Raises FileNotFoundError if either is gone."""
    return _read(source.uri), _read(source.lr) if source.lr else None


def _read(uri: str) -> bytes:
    folder, name = split_uri(uri)
    return open_storage(folder).read(name)
