"""Objects that are files below a directory."""

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from deedsr.errors import DeeDSRError
from pipelines.storage.errors import Conflict, explained
from pipelines.storage.interface import ANYTHING, Entry, Expected, Storage, Upload
from pipelines.storage.lock import PARTIAL, locked

__all__ = ["LocalStorage"]


class LocalStorage(Storage):
    def __init__(self, directory: Path):
        self.directory = Path(os.path.abspath(directory))
        self.uri = str(self.directory)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        yield from self._walk(prefix.strip("/"), ())

    def _walk(self, folder: str, above: tuple[str, ...]) -> Iterator[Entry]:
        """In the order of whole paths, although only one folder's names are held."""
        here = self.directory / folder
        identity = os.path.realpath(here)
        if identity in above:  # a symbolic link to one of its own parents
            return
        try:
            with explained("list", str(here)):
                found = sorted(os.scandir(here), key=lambda item: os.fsencode(item.name + "/" * item.is_dir()))
        except FileNotFoundError:
            return
        for item in found:
            path = f"{folder}/{item.name}" if folder else item.name
            if item.is_dir():
                yield from self._walk(path, (*above, identity))
            elif not item.name.endswith(PARTIAL):
                try:
                    status = item.stat()
                except OSError:  # a dangling link: reading it will say so
                    yield Entry(path, 0, "")
                else:
                    yield Entry(path, status.st_size, str(status.st_mtime_ns))

    def read(self, path: str) -> bytes:
        with explained("read", str(self.directory / path)):
            return (self.directory / path).read_bytes()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        with explained("read", str(self.directory / path)), (self.directory / path).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def open(self, path: str) -> BinaryIO:
        with explained("read", str(self.directory / path)):
            return (self.directory / path).open("rb")

    def write(self, path: str, data: bytes | Path, *, expected: Expected = ANYTHING) -> str:
        target = self.directory / path
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
        with explained("write", str(target)):
            if expected not in (ANYTHING, None) and expected != _modified(target):
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
                with nullcontext() if expected is ANYTHING else locked(target.parent / f".lock{PARTIAL}"):
                    present = _modified(target)
                    if expected is not ANYTHING and expected != present:
                        raise Conflict(str(target))
                    version = partial.stat().st_mtime_ns
                    if present and version <= int(present):  # written within one tick of the file system's clock
                        version = int(present) + 1
                        os.utime(partial, ns=(version, version))
                    partial.replace(target)
                return str(version)
            finally:
                partial.unlink(missing_ok=True)

    def stat(self, path: str) -> Entry:
        with explained("read", str(self.directory / path)):
            status = (self.directory / path).stat()
        return Entry(path, status.st_size, str(status.st_mtime_ns))

    def delete(self, path: str) -> None:
        with explained("delete", str(self.directory / path)):
            (self.directory / path).unlink(missing_ok=True)
            # As on S3, a folder is gone with its last object.
            for folder in (self.directory / path).parents:
                if folder == self.directory:
                    break
                try:
                    folder.rmdir()
                except FileNotFoundError:  # somebody else removed it, or there never was one
                    continue
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                    break

    def delete_many(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.delete(path)

    def delete_all(self) -> None:
        with explained("delete", self.uri), suppress(FileNotFoundError):
            shutil.rmtree(self.directory)

    def child(self, path: str) -> Storage:
        return LocalStorage(self.directory / path)

    def download(self, path: str, target: Path) -> None:
        with explained("read", str(self.directory / path)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.directory / path, target)

    def local_path(self, path: str) -> Path:
        return self.directory / path

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


def _modified(target: Path) -> str | None:
    try:
        return str(target.stat().st_mtime_ns)
    except FileNotFoundError:
        return None
