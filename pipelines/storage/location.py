"""From what a user writes to storages and their objects: locations, and patterns of them.

A pattern has `*`, `?` and `[...]` within a name, `**` for any folders, `{a,b}` and `{0..9}`. A part of a location that
exists under that name is taken literally; the first one that does not begins the pattern.
"""

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from braceexpand import braceexpand

from deedsr.errors import UsageError
from pipelines.storage.errors import not_shared
from pipelines.storage.interface import Entry, Storage, is_hidden
from pipelines.storage.local import LocalStorage
from pipelines.storage.s3 import S3Storage

_SPECIAL, _WILDCARD = re.compile(r"[*?\[{]"), re.compile(r"[*?\[]")


def open_storage(uri: str | Path) -> Storage:
    """The storage at `s3://bucket/prefix`, `file:///dir` or a plain path; nothing is created or contacted yet."""
    text = str(uri)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if not text:
        raise UsageError("an empty location: give s3://bucket/prefix, file:///dir or a path")
    if scheme is None:
        return LocalStorage(Path(os.path.expanduser(text)))  # not `Path.expanduser`, which raises for `~nobody.jpg`
    rest = text[scheme.end() :]
    if scheme[1].lower() == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise UsageError(f"{text} names no local directory: write file:///dir, with three slashes")
        return LocalStorage(Path("/" + unquote(path)))
    if scheme[1].lower() == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise UsageError(f"{text} names no bucket: write s3://bucket/prefix")
        if "@" in bucket or ":" in bucket:  # not repeated in the message, which may be logged
            raise UsageError(
                "an s3:// location holds no keys or port: write s3://bucket/prefix and set the AWS variables"
            )
        return S3Storage(bucket, prefix)
    raise UsageError(
        f"{re.sub('//[^/]*@', '//***@', text)}: locations are s3://bucket/prefix, file:///dir or a path, not {scheme[1]}://"
    )


def require_here(uri: str) -> None:
    """Raises UsageError on a worker that does not have a local folder `uri`."""
    place = open_storage(uri).local_path("")
    if place is not None and not place.exists():
        raise not_shared(str(place))


def object_at(uri: str) -> tuple[Storage, str]:
    """The storage of one object, and the path in it.

    In S3 the path is the whole key: a prefix would lose the second slash of `photos//a.jpg`.
    """
    if uri.startswith("s3://"):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return open_storage(f"s3://{bucket}"), key
    folder, _, name = uri.rpartition("/")
    return open_storage(folder or ("/" if uri.startswith("/") else ".")), name


def has_wildcard(pattern: str) -> bool:
    """Whether a listing is needed to resolve a pattern; braces alone need none."""
    return bool(_WILDCARD.search(pattern))


def split_pattern(uri: str) -> tuple[str, str]:
    """The folder, and the pattern of paths below it; an empty pattern for a location without one.

    Raises UsageError for a pattern in place of a bucket.
    """
    begin = uri.index("/", len("s3://")) if re.match("s3://[^/]+/", uri) else 0
    if _SPECIAL.search(uri[:begin] or (uri if uri.startswith("s3://") else "")):
        raise UsageError(f"{uri}: the name of a bucket cannot be a pattern")
    place = begin
    while found := _SPECIAL.search(uri, place):
        end = uri.find("/", found.start())
        end = len(uri) if end < 0 else end
        if not _exists(uri[:end]):
            start = uri.rindex("/", 0, found.start()) if "/" in uri[: found.start()] else -1
            return uri[:start] or "/", uri[start + 1 :]
        place = end
    return uri, ""


def _exists(uri: str) -> bool:
    storage = open_storage(uri)
    local = storage.local_path("")
    if local is not None:
        return os.path.lexists(local)
    bucket, key = object_at(uri)
    return bucket.exists(key) or any(True for _ in storage.list())


def expanded(pattern: str) -> list[str]:
    """The alternatives of a pattern with braces. Raises UsageError for unbalanced ones."""
    try:
        return [*braceexpand(pattern)]
    except ValueError as error:
        raise UsageError(f"{pattern} is not a pattern: {error}") from None


def matching(storage: Storage, pattern: str) -> Iterator[Entry]:
    """Objects whose path matches. A hidden one matches only a part that begins with a dot, as in a shell."""
    wanted = [path.split("/") for path in expanded(pattern)]
    within = lambda folder: any(_may_hold(folder.split("/"), parts) for parts in wanted)
    for entry in storage.list(within=within):
        if any(_matches(entry.path.split("/"), parts) for parts in wanted):
            yield entry


def _matches(path: list[str], pattern: list[str]) -> bool:
    if not pattern or not path:
        return not pattern and not path
    if pattern[0] != "**":
        return _is(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
    if pattern == ["**"]:
        return not is_hidden("/".join(path))
    return _matches(path, pattern[1:]) or (not is_hidden(path[0]) and _matches(path[1:], pattern))


def _may_hold(folder: list[str], pattern: list[str]) -> bool:
    """Whether something below a folder can match."""
    if not folder or not pattern or pattern[0] == "**":
        return bool(pattern)
    return _is(folder[0], pattern[0]) and _may_hold(folder[1:], pattern[1:])


def _is(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (not is_hidden(name) or pattern.startswith("."))
