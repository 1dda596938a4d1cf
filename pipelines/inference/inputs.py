"""Which pictures the inputs of a command name, and where their results go."""

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from deedsr.errors import UsageError
from pipelines.inference.encoding import EXTENSIONS, Format
from pipelines.storage import Storage, is_hidden, leads_out, object_at, open_storage
from pipelines.storage.location import matching, split_pattern

__all__ = ["Source", "conflicts", "find_sources"]

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff"),
    *(".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)


class Source(NamedTuple):
    """One picture to enlarge."""

    storage: Storage
    path: str  # in its storage
    target: str  # of its result, in the output's storage

    @property
    def uri(self) -> str:
        return _uri(self.storage, self.path)


def find_sources(inputs: Sequence[str], out: Storage, format: Format) -> list[Source]:
    """Every picture of the inputs in their order, each once. Raises UsageError for an input that has none."""
    found: dict[str, Source] = {}
    for given in inputs:
        places = list(_places(given, out))
        if not places:
            raise UsageError(
                f"{given} has no picture to upscale: give files, folders, glob patterns or URIs with "
                f"{', '.join(SUFFIXES)} (what lies in --out is left out)"
            )
        for storage, path, kept in places:
            source = Source(storage, path, _result_name(kept, format))
            found.setdefault(source.uri, source)
    return list(found.values())


def conflicts(sources: Iterable[Source], out: Storage) -> dict[str, str]:
    """Which sources must not be enlarged, by URI, and why: their results would replace an input or one another, or lie
    outside of `out`."""
    sources = list(sources)
    inputs = {_identity(source.storage, source.path): source.uri for source in sources}
    taken: dict[str, str] = {}
    found = {}
    for source in sources:
        if leads_out(source.target):
            found[source.uri] = f"its name {source.path} leads out of --out: give it another, or name it alone"
            continue
        replaced = inputs.get(_identity(out, source.target))
        if replaced == source.uri:
            found[source.uri] = "its result would replace it: choose another --out"
        elif replaced is not None:
            found[source.uri] = f"its result would replace the input {replaced}: choose another --out"
        elif source.target in taken:
            found[source.uri] = f"its result would replace that of {taken[source.target]}: give it another --out"
        else:
            taken[source.target] = source.uri
    return found


def _identity(storage: Storage, path: str) -> str | tuple[int, int]:
    """Equal for two names of one local file (links, letter case), else the URI."""
    local = storage.local_path(path)
    if local is not None:
        try:
            status = local.stat()
        except OSError:
            pass
        else:
            return status.st_dev, status.st_ino
    return _uri(storage, path)


def _places(given: str, out: Storage) -> Iterator[tuple[Storage, str, str]]:
    """(storage, path in it, the path that its result keeps) of an input's pictures.

    What lies in `out` are results of earlier commands: a folder or pattern leaves them out, a file's own name does not.
    """
    uri = open_storage(given).uri
    is_result = lambda storage, path: _uri(storage, path).startswith(f"{out.uri.rstrip('/')}/")
    folder, pattern = split_pattern(uri)
    if pattern:
        storage = open_storage(folder)
        for entry in matching(storage, pattern):
            if _is_picture(entry.path) and not is_result(storage, entry.path):
                yield storage, entry.path, posixpath.basename(entry.path)
    elif _is_file(uri):
        storage, path = object_at(uri)
        yield storage, path, posixpath.basename(path)
    else:
        yield from (place for place in _below(open_storage(uri)) if not is_result(*place[:2]))


def _is_file(uri: str) -> bool:
    local = open_storage(uri).local_path("")
    if local is None:
        bucket, key = object_at(uri)
        return bool(key) and bucket.exists(key)
    if not local.exists():
        raise UsageError(f"{uri} does not exist")
    return not local.is_dir()


def _below(storage: Storage) -> Iterator[tuple[Storage, str, str]]:
    """The pictures below a folder, without hidden ones."""
    for entry in storage.list():
        if _is_picture(entry.path) and not is_hidden(entry.path):
            yield storage, entry.path, "/".join(part for part in entry.path.split("/") if part not in ("", "."))


def _is_picture(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _result_name(path: str, format: Format) -> str:
    """`path` with the extension of the format of its result."""
    stem, _, extension = path.rpartition(".")
    if not _is_picture(path):  # a file that was named, with no extension or an unknown one
        stem, extension = path, ""
    own = EXTENSIONS.get(extension.lower())
    wanted = (own or "png") if format == "same" else format
    return path if own == wanted else f"{stem}.{'jpg' if wanted == 'jpeg' else wanted}"  # a.JPG stays a.JPG


def _uri(storage: Storage, path: str) -> str:
    return f"{storage.uri.rstrip('/')}/{path}"
