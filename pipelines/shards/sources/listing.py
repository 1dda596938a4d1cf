"""From a `--source` to its pictures: the files it names, then what those that hold several pictures have inside."""

import logging
import os
import posixpath
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import NamedTuple

from braceexpand import braceexpand

from deedsr.errors import DeeDSRError, UsageError
from pipelines.shards.sources.source import DECODED, Source, is_hidden, is_picture, split_uri
from pipelines.shards.sources.tables import NoPictures, is_table, list_table
from pipelines.shards.sources.tars import list_tar
from pipelines.storage import Entry, Storage, open_storage

__all__ = ["list_sources"]

logger = logging.getLogger(__name__)
_THREADS = 16  # files looked into at a time
_AHEAD = 64  # files listed before the contents of one are needed
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def list_sources(uris: Sequence[str]) -> Iterator[Source]:
    """Every picture of every `--source`, in an order that follows from their names.

    A source is a folder or S3 prefix (recursive), a list file (.txt) with a path or URI a line, a tar, a Parquet table,
    or a pattern (`*`, `?` and `[...]` within a name, `{a,b}` and `{000..127}` anywhere) of files. Tars and tables are
    looked into wherever they are found; a table that names pictures elsewhere only where it is itself named. In folders
    and tars, hidden files and those not called like a picture are none. Raises UsageError for a source that does not
    exist or holds no picture.
    """
    if not uris:
        raise UsageError(
            "no source: give --source a folder, an S3 prefix, a list file (.txt), a tar or a Parquet table"
        )
    for root, uri in enumerate(uris):
        files = _files(root, uri)
        unused: list[str] = []
        empty = True
        for source in _looked_into(files, unused):
            yield source
            empty = False
        if empty:
            reason = f"; {unused[0]}" if unused else ""
            raise UsageError(f"source {uri} holds no pictures ({', '.join(DECODED)}){reason}")
        if unused:
            logger.warning("source %s: %d Parquet tables are not used: %s", uri, len(unused), unused[0])


class _Files(NamedTuple):
    """Files of a source; `named`: each was meant, not just found."""

    files: Iterable[Source]
    named: bool


def _files(root: int, uri: str) -> _Files:
    storage = open_storage(uri)
    local = storage.local_path("")
    if local is None or not local.exists():
        if re.search(r"[*?[]", storage.uri):
            return _Files(_matching(root, uri, storage.uri), True)
        if "{" in storage.uri:
            folder = _fixed_folder(storage.uri)
            return _Files(_stated(root, folder, _expanded(storage.uri)), True)
    if local is None or not local.is_dir():
        if uri.lower().endswith(".txt"):
            return _Files(_list_file(root, uri), True)
        if uri.lower().endswith((".tar", ".parquet")) and (file := _single(root, storage.uri)):
            return _Files([file], True)
    return _Files(_folder(root, storage), False)


def _folder(root: int, storage: Storage) -> Iterator[Source]:
    local = storage.local_path("")
    if local is not None and not local.exists():
        raise UsageError(f"source {storage.uri} does not exist")
    if local is not None and not local.is_dir():
        raise UsageError(
            f"source {storage.uri} is a file: give the folder it is in, or a list file (.txt) that names it"
        )
    return (_file(root, storage, entry) for entry in storage.list() if _holds_pictures(entry.path))


def _holds_pictures(path: str) -> bool:
    return is_picture(path) or (path.lower().endswith((".tar", ".parquet", *_COMPRESSED)) and not is_hidden(path))


def _file(root: int, storage: Storage, entry: Entry) -> Source:
    return Source(root, entry.path, posixpath.join(storage.uri, entry.path), entry.size, entry.version)


def _single(root: int, uri: str) -> Source | None:
    folder, name = split_uri(uri)
    storage = open_storage(folder)
    try:
        return _file(root, storage, storage.stat(name))
    except FileNotFoundError:
        return None  # or a prefix that is called so


def _matching(root: int, uri: str, pattern: str) -> list[Source]:
    """Files below the last folder before the first special character whose path matches."""
    storage = open_storage(_fixed_folder(pattern))
    wanted = [path[len(storage.uri.rstrip("/")) + 1 :].split("/") for path in _expanded(pattern)]
    found = [
        _file(root, storage, entry)
        for entry in storage.list()
        if _holds_pictures(entry.path) and any(_matches(entry.path.split("/"), parts) for parts in wanted)
    ]
    if not found:
        raise UsageError(f"source {uri} matches no picture, tar or Parquet table")
    return found


def _expanded(pattern: str) -> list[str]:
    try:
        return [*braceexpand(pattern)]
    except ValueError as error:
        raise UsageError(f"source {pattern} is not a pattern: {error}") from None


def _matches(path: list[str], pattern: list[str]) -> bool:
    return len(path) == len(pattern) and all(map(fnmatchcase, path, pattern))


def _fixed_folder(pattern: str) -> str:
    return split_uri(re.split(r"[*?[{]", pattern, maxsplit=1)[0])[0]


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
    parts = [place.split("/") for place in places]
    common = storage.uri.rstrip("/").split("/")
    if any(absolute) or any(part[: len(common)] != common for part in parts):
        common = list(os.path.commonprefix([part[:-1] for part in parts]))
    return _stated(root, "/".join(common), places)


def _stated(root: int, folder: str, places: list[str]) -> list[Source]:
    """The files at `places`, which lie below `folder`; those that don't exist have no version."""
    places = sorted(set(places))
    with ThreadPoolExecutor(_THREADS) as threads:
        return [
            Source(root, place[len(folder.rstrip("/")) + 1 :], place, entry.size, entry.version)
            for place, entry in zip(places, threads.map(_stat, places), strict=True)
        ]


def _stat(uri: str) -> Entry:
    folder, name = split_uri(uri)
    try:
        return open_storage(folder).stat(name)
    except FileNotFoundError:
        return Entry(name, 0, "")  # reading it will say so, and it is recorded as rejected


def _looked_into(files: _Files, unused: list[str]) -> Iterator[Source]:
    """Pictures themselves, and those inside of the other files; `unused` gets what tables without any say."""
    with ThreadPoolExecutor(_THREADS) as threads:
        waiting: deque[Future[Iterable[Source]] | list[Source]] = deque()
        for file in files.files:
            container = file._replace(version=f"{file.size}-{file.version}", container=file.path)
            if file.path.lower().endswith(".tar"):
                waiting.append(threads.submit(list_tar, container))
            elif is_table(file.path):
                waiting.append(threads.submit(list_table, container, follow=files.named))
            elif file.path.lower().endswith(_COMPRESSED):
                waiting.append([file._replace(problem="compressed tar file: it must be unpacked")])
            else:
                waiting.append([file])
            if len(waiting) > _AHEAD:
                yield from _result(waiting.popleft(), files.named, unused)
        while waiting:
            yield from _result(waiting.popleft(), files.named, unused)


def _result(found: Future[Iterable[Source]] | list[Source], named: bool, unused: list[str]) -> Iterable[Source]:
    if isinstance(found, list):
        return found
    try:
        return found.result()
    except NoPictures as error:
        if named:
            raise
        unused.append(str(error))
        return []
