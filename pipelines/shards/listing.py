"""From a `--source` to its pictures: the files it names, then what those that hold several pictures have inside."""

import codecs
import logging
import os
import posixpath
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from deedsr.errors import DeeDSRError, UsageError
from pipelines.shards.source import DECODED, Source, is_picture
from pipelines.shards.tables import NoPictures, is_table, list_table
from pipelines.shards.tars import list_tar
from pipelines.storage import Entry, Storage, is_hidden, open_storage, split_uri
from pipelines.storage.patterns import expanded, has_wildcard, matching, split_pattern

__all__ = ["list_sources"]

logger = logging.getLogger(__name__)
_THREADS = 16  # files looked into at a time
_AHEAD = 64  # files listed before the contents of one are needed
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BYTE_ORDER_MARKS = {  # what editors and shells of Windows begin a text with, the longer ones first
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip


def list_sources(uris: Sequence[str]) -> Iterator[Source]:
    """Every picture of every `--source`, in an order that follows from their names.

    A source is a folder or S3 prefix (recursive), a list file (.txt) with a path or URI a line, a tar, a Parquet table,
    or a pattern of files (`*`, `?` and `[...]` within a name, `**` for any folders, `{a,b}` and `{000..127}`); what is
    called like a pattern is itself. Tars and tables are
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
    folder, pattern = split_pattern(storage.uri)
    if pattern and has_wildcard(pattern):
        return _Files(_matching(root, uri, open_storage(folder), pattern), True)
    if pattern:
        return _Files(_stated(root, folder, [f"{folder.rstrip('/')}/{path}" for path in expanded(pattern)]), True)
    local = storage.local_path("")
    if local is None or not local.is_dir():
        if uri.lower().endswith(".txt") and (local is not None or not any(True for _ in storage.list())):
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
    return _named_as_pictures(path) and not is_hidden(path)


def _named_as_pictures(path: str) -> bool:
    return is_picture(path) or path.lower().endswith((".tar", ".parquet", *_COMPRESSED))


def _file(root: int, storage: Storage, entry: Entry) -> Source:
    return Source(root, entry.path, f"{storage.uri.rstrip('/')}/{entry.path}", entry.size, entry.version)


def _single(root: int, uri: str) -> Source | None:
    folder, name = split_uri(uri)
    try:
        entry = open_storage(folder).stat(name)
    except FileNotFoundError:
        return None  # or a prefix that is called so
    return Source(root, posixpath.basename(name), uri, entry.size, entry.version)


def _matching(root: int, uri: str, storage: Storage, pattern: str) -> list[Source]:
    """Files whose path below the last folder without a special character matches."""
    found = [_file(root, storage, entry) for entry in matching(storage, pattern) if _named_as_pictures(entry.path)]
    if not found:
        raise UsageError(f"source {uri} matches no picture, tar or Parquet table")
    return found


def _list_file(root: int, uri: str) -> list[Source]:
    """Lines are relative to the list's folder, and name their sources as they are.

    If one is absolute or leads out of that folder, every source is named by its part below the common folder of all.
    """
    place, name = split_uri(uri)
    storage = open_storage(posixpath.dirname(uri) or ".")
    try:
        lines = [line for line in _text(open_storage(place).read(name)) if line.strip()]
    except FileNotFoundError:
        raise UsageError(f"source {uri} does not exist") from None
    except (UnicodeDecodeError, DeeDSRError) as error:
        raise UsageError(f"source {uri} is not a list file with one path or URI a line ({error})") from None
    if not lines:
        raise UsageError(f"source {uri} names no pictures: write one path or URI a line")
    absolute = [line.startswith("/") or "://" in line for line in lines]
    places = [
        open_storage(line if is_absolute else f"{storage.uri}/{line}").uri
        for line, is_absolute in zip(lines, absolute, strict=True)
    ]
    if len({place.startswith("s3://") for place in places}) > 1:
        raise UsageError(f"source {uri} mixes local files and S3 objects: write one list for each")
    parts = [place.split("/") for place in places]
    common = storage.uri.rstrip("/").split("/")
    if any(absolute) or any(part[: len(common)] != common for part in parts):
        common = list(os.path.commonprefix([part[:-1] for part in parts]))
    return _stated(root, "/".join(common), places)


def _text(data: bytes) -> list[str]:
    """Lines; a name that is not UTF-8 is kept as its bytes, and rejected by itself later."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            text = data[len(mark) :].decode(encoding)
            break
    else:
        if b"\0" in data:
            raise DeeDSRError("it holds zero bytes")
        text = data.decode(errors="surrogateescape")
    return [line.removesuffix("\r") for line in text.split("\n")]  # `splitlines` would split names


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
            if not file.version:  # missing or unreadable: reading it gives the reason
                waiting.append([file])
            elif file.path.lower().endswith(".tar"):
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
