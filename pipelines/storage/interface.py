"""Interface of a storage, and rules for the names of its objects."""

import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, NamedTuple

ANYTHING = "*"  # in place of an expected version: whatever is there
Expected = str | None


class Entry(NamedTuple):
    """One object: path relative to its storage, bytes, and a version that changes when the content does, empty where it
    cannot be read."""

    path: str
    size: int
    version: str  # modification time in ns, or the ETag: on S3, equal content has an equal version


class Upload(NamedTuple):
    """An unfinished write: under way, or abandoned by a process that died. No listing shows it."""

    path: str  # of the object that it would have become
    id: str
    started: datetime  # with its time zone


class Storage(ABC):
    """Objects below one location, addressed by relative paths with `/`. Pickles: a client is made where it is used."""

    uri: str

    @abstractmethod
    def list(self, prefix: str = "", within: Callable[[str], bool] | None = None) -> Iterator[Entry]:
        """Every object below the folder `prefix`, recursive, sorted by path; nothing if there is no such folder.

        `within`: folders, by their path, for which it is false may be left out. A folder below it that cannot be
        listed is left out with a warning.
        """

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole object, of one version. Raises FileNotFoundError if there is none."""

    @abstractmethod
    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end. Raises FileNotFoundError if there is no such object."""

    @abstractmethod
    def open(self, path: str, read_ahead: int = 4 << 20) -> BinaryIO:
        """The object as a seekable file to read, in a few MiB of memory however large it is.

        `read_ahead`: least bytes of a request to a remote storage; 0 for readers that ask for ranges of their own. All
        of it is one version: if another process replaces the object, what is read stays the old one (local) or reading
        raises Conflict (S3). Raises FileNotFoundError if there is none.
        """

    @abstractmethod
    def write(self, path: str, data: bytes | Path, *, expected: Expected = ANYTHING) -> str:
        """Puts an object, from memory or from a local file, and returns its version.

        Readers see the old object or the new one, never a part. `expected`: what must be there for the write to
        happen: None for no object, or the version of one (`Entry.version`). Raises Conflict, and changes nothing, if
        it is something else: of several processes that expect the same, one writes. A write
        without `expected` is unconditional.
        """

    @abstractmethod
    def stat(self, path: str) -> Entry:
        """Size and version of one object. Raises FileNotFoundError if there is none."""

    def version(self, path: str) -> str | None:
        """Version of one object, None if there is none: what `write` expects."""
        try:
            return self.stat(path).version
        except FileNotFoundError:
            return None

    def exists(self, path: str) -> bool:
        return self.version(path) is not None

    @abstractmethod
    def delete(self, path: str) -> None:
        """Removes an object; none there is fine."""

    def delete_many(self, paths: Iterable[str]) -> None:
        """Removes objects, on S3 a thousand with each request."""
        for path in paths:
            self.delete(path)

    @abstractmethod
    def delete_all(self) -> None:
        """Removes everything below this location, with unfinished writes and the marks of empty folders."""

    @abstractmethod
    def child(self, path: str) -> "Storage":
        """The storage below the folder `path`."""

    @abstractmethod
    def download(self, path: str, target: Path) -> None:
        """Copies an object to a local file."""

    @abstractmethod
    def require_writable(self, needed_bytes: int | None = None) -> None:
        """Checks before the work that results can be written, without leaving anything.

        Raises UsageError for a missing bucket, credentials that are wrong or may not write, and a read-only place;
        DeeDSRError for a local disk that is full or has less than `needed_bytes` free.
        """

    @abstractmethod
    def uploads(self) -> Iterator[Upload]:
        """Writes that have begun and not ended, below this location."""

    @abstractmethod
    def abort(self, upload: Upload) -> None:
        """Frees what an upload holds; one that has ended is fine."""

    def abandoned_uploads(self, older_than: timedelta) -> Iterator[Upload]:
        """Uploads that began at least `older_than` ago: by then, one under way would have ended."""
        latest = datetime.now().astimezone() - older_than
        return (upload for upload in self.uploads() if upload.started <= latest)

    def abort_uploads(self, older_than: timedelta) -> int:
        """Frees what abandoned uploads hold; returns their number."""
        abandoned = [*self.abandoned_uploads(older_than)]
        for upload in abandoned:
            self.abort(upload)
        return len(abandoned)

    def local_path(self, path: str) -> Path | None:
        """The object's place in the local file system, None where it has none."""
        return None


LONGEST_PART = 255  # bytes between two slashes, on nearly every file system


def is_hidden(path: str) -> bool:
    """Whether a part of the relative path is hidden: macOS's `._photo.jpg`, `.thumbnails/photo.png`."""
    return any(part.startswith(".") and part.strip(".") for part in path.split("/"))


def leads_out(path: str) -> bool:
    """Whether a name leads out of its folder: absolute, with `..`, or with a zero byte, which no path has."""
    return path.startswith("/") or "\0" in path or ".." in path.split("/")


def makes_a_file(path: str) -> bool:
    """Whether an object can be copied to a file of its name below a folder, and no other name gives the same file."""
    short = all(len(os.fsencode(part)) <= LONGEST_PART for part in path.split("/"))
    return not leads_out(path) and posixpath.normpath(path) == path and short
