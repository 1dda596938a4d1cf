"""Keeps files of local shards open and fetches remote shards ahead of need, once per node.

Remote shards are fetched whole, once for all workers of a node, into a folder that holds at most so many bytes; those
unused for longest make room. A copy has its final name only when its size and SHA-256 are the manifest's, so a
partial file is never used. Nothing waits for a copy: what is not here yet, does not fit, or could not be fetched, as on
a full disk, is read from the storage by range.
"""

import hashlib
import logging
import os
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from deedsr.dataset.manifest import Manifest, ShardEntry
from deedsr.errors import DeeDSRError
from pipelines import machine
from pipelines.data.dataset import Shards
from pipelines.storage import Storage
from pipelines.storage.errors import explained
from pipelines.storage.lock import locked

logger = logging.getLogger(__name__)
_OPEN_FILES = 64
_PARTIAL = re.compile(r"[0-9a-f]{64}-(\d+)\.partial")
_FETCHES = 4  # at a time, by each worker
_RETRY_SECONDS = 30.0  # after a fetch that failed
_BUSY_SECONDS = 0.5  # before looking again at a shard that another worker fetches


class _Remote(NamedTuple):
    storage: Storage
    entry: ShardEntry

    @property
    def copy(self) -> str:
        return f"{self.entry.sha256}.tar"

    @property
    def partial(self) -> str:
        """Says how large it will be, so that room is kept for it from the beginning."""
        return f"{self.entry.sha256}-{self.entry.bytes}.partial"


class ShardCache:
    """`open` is a `Dataset`'s `through`; `need` sets which shards will be read next. A context manager.

    `limit`: bytes that the copies in `folder` take at most; 0 turns copies off. By default all workers and runs of a
    user on a node have one folder.
    """

    def __init__(self, limit: int, folder: Path | None = None):
        self.limit, self.folder = limit, folder or machine.cache_folder() / "deedsr" / "shards"
        self.fetched = self.ranged = 0  # whole shards; reads that went to the storage
        self._known: dict[str, _Remote] = {}
        self._needed: tuple[str, ...] = ()
        self._too_big: set[str] = set()  # no room beside what else is needed now
        self._changed, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._fetch_ahead, name="shard-cache", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1)  # a download under way ends with the process: a partial file is never used

    def open(self, storage: Storage, manifest: Manifest) -> Shards:
        """How the shards of a dataset are read."""
        if storage.local_path("") is not None:
            return _OpenFiles(storage)
        if not self.limit:
            return storage
        self._known |= {entry.name: _Remote(storage, entry) for entry in manifest.shards}
        if not self._thread.is_alive():
            self._thread.start()
        self._changed.set()
        return _OpenFiles(storage, self)

    def need(self, names: Iterable[str]) -> None:
        """Shards of the current and the next window, the most urgent first: none of them makes room for another."""
        self._needed = tuple(names)
        self._too_big.clear()
        self._changed.set()

    def copy(self, name: str) -> Path:
        return self.folder / self._known[name].copy

    def _fetch_ahead(self) -> None:
        while not self._over.is_set():
            self._changed.clear()
            with ThreadPoolExecutor(_FETCHES) as threads:
                waits = [*threads.map(self._fetch_one, self._needed)]
            self._changed.wait(min((wait for wait in waits if wait is not None), default=None))

    def _fetch_one(self, name: str) -> float | None:
        """Seconds until the shard is to be looked at again, None for never."""
        remote = self._known.get(name)
        if remote is None or name in self._too_big:
            return None
        if self._changed.is_set():  # something else may be more urgent
            return 0.0
        try:
            return None if self._fetch(remote) else _BUSY_SECONDS
        except (OSError, DeeDSRError) as error:
            logger.warning("shard %s is read by ranges, its copy in %s failed: %s", name, self.folder, error)
            return _RETRY_SECONDS

    def _fetch(self, remote: _Remote) -> bool:
        """False if another worker is at it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        copy = self.folder / remote.copy
        with suppress(FileNotFoundError):
            os.utime(copy)  # the copies unused for longest go first
            return True
        with locked(self._lock(remote.copy), wait=False) as mine:
            if not mine:
                return False
            partial = self.folder / remote.partial
            with locked(self.folder / "room.lock"):
                if copy.exists():
                    return True
                if not self._make_room(remote.entry.bytes):
                    self._too_big.add(remote.entry.name)
                    return True
                partial.touch()
            try:
                remote.storage.download(remote.entry.name, partial)
                _require_whole(partial, remote.entry)
                partial.rename(copy)
                self.fetched += 1
            finally:
                partial.unlink(missing_ok=True)
        return True

    def _make_room(self, size: int) -> bool:
        """Whether `size` bytes fit now. Holds the lock on the room."""
        kept = {self._known[name].copy for name in self._needed if name in self._known}
        taken, removable = 0, []
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if (partial := _PARTIAL.fullmatch(file.name)) and not self._abandoned(file):
                    taken += int(partial[1])
                elif file.suffix == ".tar":
                    status = file.stat()
                    taken += status.st_size
                    if file.name not in kept:
                        removable.append((status.st_mtime_ns, status.st_size, file))
        removable.sort()
        while removable and taken + size > self.limit:
            _, freed, file = removable.pop(0)
            file.unlink(missing_ok=True)
            taken -= freed
        return taken + size <= self.limit

    def _abandoned(self, partial: Path) -> bool:
        """Removes the partial file of a dead process, whose lock is free."""
        with locked(self._lock(partial.name), wait=False) as mine:
            if mine:
                partial.unlink(missing_ok=True)
            return mine

    def _lock(self, file: str) -> Path:
        return self.folder / f"{file[:2]}.lock"


class _OpenFiles:
    """Shards of a local storage, or of a remote one through its copies where these are. The last files stay open."""

    def __init__(self, storage: Storage, cache: ShardCache | None = None):
        self.uri, self._storage, self._cache = storage.uri, storage, cache
        self._open: Any = lru_cache(_OPEN_FILES)(partial(open, mode="rb"))

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        # The file is held while it is read, so that it is not closed meanwhile.
        if self._cache is None:
            with explained("read", f"{self.uri}/{path}"):
                file = self._open(self._storage.local_path(path))
                return os.pread(file.fileno(), size, offset)
        try:
            file = self._open(self._cache.copy(path))
        except (OSError, KeyError):
            self._cache.ranged += 1
            return self._storage.read_range(path, offset, size)
        if not os.fstat(file.fileno()).st_nlink:  # it has made room for others; kept open it would still take its own
            self._open.cache_clear()
        return os.pread(file.fileno(), size, offset)


def _require_whole(file: Path, entry: ShardEntry) -> None:
    with file.open("rb") as stored:
        sha256 = hashlib.file_digest(stored, "sha256").hexdigest()
    if (file.stat().st_size, sha256) != (entry.bytes, entry.sha256):
        raise DeeDSRError(f"{entry.name} did not arrive as the manifest has it")
