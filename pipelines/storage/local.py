"""Objects that are files below a directory."""

import errno
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from deedsr.errors import DeeDSRError
from pipelines import machine
from pipelines.storage.errors import Conflict, explained
from pipelines.storage.interface import ANYTHING, LONGEST_PART, Entry, Expected, Storage, Upload, leads_out
from pipelines.storage.lock import PARTIAL, locked

logger = logging.getLogger(__name__)
_ID = 12  # hexadecimal digits in the name of such a file


class LocalStorage(Storage):
    def __init__(self, directory: Path):
        self.directory = Path(os.path.abspath(directory))
        self.uri = str(self.directory)

    def list(self, prefix: str = "", within: Callable[[str], bool] | None = None) -> Iterator[Entry]:
        yield from self._walk(prefix.strip("/"), (), within)

    def _walk(self, folder: str, above: tuple[str, ...], within: Callable[[str], bool] | None) -> Iterator[Entry]:
        """In the order of whole paths, although only one folder's names are held."""
        here = self._place(folder)
        identity = os.path.realpath(here)
        if identity in above:  # a symbolic link to one of its own parents
            return
        try:
            with explained("list", str(here)):
                found = sorted(os.scandir(here), key=lambda item: os.fsencode(item.name + "/" * _is_folder(item)))
        except FileNotFoundError:
            return
        except DeeDSRError as error:
            if not above:
                raise
            logger.warning("%s; it is left out", error)
            return
        for item in found:
            path = f"{folder}/{item.name}" if folder else item.name
            if _is_folder(item):
                if within is None or within(path):
                    yield from self._walk(path, (*above, identity), within)
            elif not item.name.endswith(PARTIAL):
                try:
                    yield _entry(item.path, path)
                except OSError:  # a link that leads nowhere
                    yield Entry(path, 0, "")

    def _place(self, path: str) -> Path:
        """Where an object lies. Raises DeeDSRError for a name that is none of this directory."""
        if leads_out(path):
            raise DeeDSRError(f"{path!r} is no name below {self.directory}: it leads out of that folder")
        return self.directory / path

    def read(self, path: str) -> bytes:
        return self.read_range(path, 0, -1)

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        with self.open(path) as file, explained("read", str(self.directory / path)):
            file.seek(offset)
            return file.read(size)

    def open(self, path: str, read_ahead: int = 0) -> BinaryIO:
        place = self._place(path)
        with explained("read", str(place)):
            return open(place, "rb", opener=machine.opened_file)

    def write(self, path: str, data: bytes | Path, *, expected: Expected = ANYTHING) -> str:
        target = self._place(path)
        partial = target.with_name(f".{begun_name(target.name)}.{uuid.uuid4().hex[:_ID]}{PARTIAL}")
        with explained("write", str(target)):
            if expected not in (ANYTHING, None) and expected != self.version(path):
                raise Conflict(str(target))  # before anything is made
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("xb") as file:
                    if isinstance(data, Path):
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, 1 << 20)
                    else:
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                with nullcontext() if expected == ANYTHING else locked(target.parent / f".lock{PARTIAL}"):
                    present = self.version(path)
                    if expected != ANYTHING and expected != present:
                        raise Conflict(str(target))
                    version = partial.stat().st_mtime_ns
                    if present and version <= int(present):  # within the resolution of the file system's clock
                        version = int(present) + 1
                        os.utime(partial, ns=(version, version))
                    partial.replace(target)
                return str(version)
            finally:
                partial.unlink(missing_ok=True)

    def stat(self, path: str) -> Entry:
        place = self._place(path)
        with explained("read", str(place)):
            return _entry(place, path)

    def delete(self, path: str) -> None:
        place = self._place(path)
        with explained("delete", str(place)):
            place.unlink(missing_ok=True)
            # As on S3, a folder is gone with its last object.
            for folder in place.parents:
                if folder == self.directory:
                    break
                try:
                    folder.rmdir()
                except FileNotFoundError:  # removed by another process, or never there
                    continue
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                    break

    def delete_all(self) -> None:
        with explained("delete", self.uri), suppress(FileNotFoundError):
            shutil.rmtree(self.directory)

    def child(self, path: str) -> Storage:
        return LocalStorage(self._place(path))

    def download(self, path: str, target: Path) -> None:
        with self.open(path) as file, explained("write", str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as copy:
                shutil.copyfileobj(file, copy, 1 << 20)

    def local_path(self, path: str) -> Path:
        return self._place(path)

    def require_writable(self, needed_bytes: int | None = None) -> None:
        folder = self.directory
        while not os.path.lexists(folder):  # what is missing would be made
            folder = folder.parent
        with explained("write", self.uri):
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(4096))
                probe.flush()
                os.fsync(probe.fileno())
            free = shutil.disk_usage(folder).free
        if needed_bytes is not None and free < needed_bytes:
            raise DeeDSRError(
                f"{self.uri} needs about {needed_bytes:,} bytes and its disk has {free:,} free: "
                "free some, or choose another place"
            )

    def uploads(self) -> Iterator[Upload]:
        with explained("list", self.uri):
            for file in sorted(self.directory.rglob(f".*{PARTIAL}")):
                path = file.relative_to(self.directory)
                target = path.with_name(path.name[1:].removesuffix(PARTIAL).rpartition(".")[0])
                try:
                    modified = file.stat().st_mtime
                except FileNotFoundError:  # it has just ended
                    continue
                yield Upload(target.as_posix(), path.as_posix(), datetime.fromtimestamp(modified).astimezone())

    def abort(self, upload: Upload) -> None:
        self.delete(upload.id)


def begun_name(name: str) -> str:
    """The part of a name that is in that of the file while it is written, which is longer."""
    room = LONGEST_PART - len(f"..{PARTIAL}") - _ID
    return name if len(os.fsencode(name)) <= room else os.fsencode(name)[:room].decode(errors="ignore")


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself
        return False


def _entry(place: str | Path, path: str) -> Entry:
    """The version is empty where the file cannot be read; reading it gives the reason."""
    status = os.stat(place)
    if stat.S_ISREG(status.st_mode) and machine.may_read(place):
        return Entry(path, status.st_size, str(status.st_mtime_ns))
    return Entry(path, 0, "")
