"""Which pictures the inputs of a command name, and where their results go."""

import glob
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from deedsr.errors import UsageError
from pipelines.storage import LocalStorage, Storage, open_storage
from pipelines.upscaling.encoding import EXTENSIONS, Format

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
    """Which sources must not be enlarged, by URI, and why: their results would replace an input or one another."""
    sources = list(sources)
    inputs = {_identity(source.storage, source.path): source.uri for source in sources}
    taken: dict[str, str] = {}
    found = {}
    for source in sources:
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
    """(storage, path in it, the path that its result keeps) of an input's pictures."""
    storage = open_storage(given)
    if not isinstance(storage, LocalStorage):
        yield from _in_bucket(storage, out)
    elif storage.directory.is_dir():
        yield from _below(storage, out)
    elif storage.directory.is_file():
        yield _file(storage.directory)
    elif glob.has_magic(given):
        matches = map(Path, sorted(glob.glob(str(storage.directory), recursive=True)))
        yield from (_file(match) for match in matches if match.is_file() and _is_picture(match.name))
    else:
        raise UsageError(f"{given} does not exist")


def _in_bucket(storage: Storage, out: Storage) -> Iterator[tuple[Storage, str, str]]:
    bucket = storage.uri.split("/")[2]
    if glob.has_magic(bucket):
        raise UsageError(f"{storage.uri}: the name of a bucket cannot be a pattern")
    folder, _, name = storage.uri.rpartition("/")
    if folder != "s3:/" and open_storage(folder).exists(name):
        yield open_storage(folder), name, name
    elif glob.has_magic(storage.uri):
        parts = storage.uri.split("/")
        fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        storage, pattern = open_storage("/".join(parts[:fixed])), parts[fixed:]
        for entry in storage.list():
            if _is_picture(entry.path) and _matches(entry.path.split("/"), pattern):
                yield storage, entry.path, entry.path.rpartition("/")[2]
    else:
        yield from _below(storage, out)


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """As `glob` matches files: `*` within one folder, `**` over any number of them."""
    if not pattern or not parts:
        return not pattern and not parts
    if pattern == ["**"]:
        return True
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts)))
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _below(storage: Storage, out: Storage) -> Iterator[tuple[Storage, str, str]]:
    """The pictures below a folder, without results of an earlier command."""
    results = f"{out.uri.rstrip('/')}/"
    for entry in storage.list():
        if _is_picture(entry.path) and not _uri(storage, entry.path).startswith(results):
            yield storage, entry.path, entry.path


def _file(path: Path) -> tuple[Storage, str, str]:
    return LocalStorage(path.parent), path.name, path.name


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
