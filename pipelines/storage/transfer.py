"""Whole folders between the local file system and any storage, and the copies that a node keeps of remote ones.

Copies are below `machine.cache_folder()`, each fetched once for all processes. `DEEDSR_CACHE_GB` (50) is how much they
may take, in 1e9 bytes. When one is added, the least recently used ones are removed, except those that a living process
has asked for. Copies of shards have a folder and a limit of their own (`train.cache_gb`).
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO

from deedsr.errors import UsageError
from pipelines import machine
from pipelines.storage.errors import explained
from pipelines.storage.interface import makes_a_file
from pipelines.storage.local import LocalStorage
from pipelines.storage.location import open_storage
from pipelines.storage.lock import PARTIAL, is_at, locked, remove_abandoned
from pipelines.storage.s3 import TRANSFERS

logger = logging.getLogger(__name__)
_NAME = re.compile("[0-9a-f]{64}")
_used: dict[Path, IO[bytes]] = {}  # by this process: files beside the folders, under a shared lock while it lives


def localize(uri: str | Path, wanted: Callable[[str], bool] = lambda path: True) -> Path:
    """A local directory with what lies at `uri`: the directory itself, or an S3 prefix downloaded once.

    `wanted`: whether the object at a path below it is downloaded. Copies are kept by location and ETags, so that
    changed objects get another directory. An object whose name no file there can have (absolute, with `..`, too long,
    or a folder's) is left out with a warning. Raises UsageError if there is nothing at `uri`.
    """
    storage = open_storage(uri)
    local = storage.local_path("")
    if local is not None:
        if not local.is_dir():
            raise UsageError(f"{storage.uri} is not a directory" if local.exists() else f"{storage.uri} does not exist")
        return local
    entries = [entry for entry in storage.list() if wanted(entry.path)]
    if not entries:
        raise UsageError(f"there is nothing below {storage.uri}")
    name = hashlib.sha256(repr((storage.uri, [tuple(entry) for entry in entries])).encode()).hexdigest()
    folders = {str(parent) for entry in entries for parent in PurePosixPath(entry.path).parents}
    files = [entry for entry in entries if makes_a_file(entry.path) and entry.path not in folders]
    for entry in [entry for entry in entries if entry not in files]:
        logger.warning("%s/%s is left out: no file can be called so here", storage.uri, entry.path)

    def download(folder: Path) -> None:
        place = LocalStorage(folder).local_path
        with ThreadPoolExecutor(TRANSFERS) as threads:
            list(threads.map(lambda entry: storage.download(entry.path, place(entry.path)), files))

    return kept(name, download)


def publish(folder: Path, uri: str | Path) -> None:
    """Copies a local directory to `uri`. JSON files go last, outermost at the very end: they commit the rest."""
    source, target = LocalStorage(folder), open_storage(uri)
    if target.uri == source.uri:
        return
    paths = [entry.path for entry in source.list()]
    committing = sorted((path for path in paths if path.endswith(".json")), key=lambda path: -path.count("/"))
    put = lambda path: target.write(path, source.local_path(path))
    with ThreadPoolExecutor(TRANSFERS) as threads:
        list(threads.map(put, [path for path in paths if path not in committing]))
    for path in committing:
        put(path)


def kept(name: str, fill: Callable[[Path], object]) -> Path:
    """The folder `name` (a SHA-256) of this node's cache; `fill` makes it in one process, while others that want it
    wait. It stays as long as this process lives."""
    cache = machine.cache_folder() / "deedsr"
    target, partial = cache / name, cache / f"{name}{PARTIAL}"
    limit = 1e9 * machine.environment_number("DEEDSR_CACHE_GB", 50.0, "1e9 bytes")
    with explained("write", str(target)):
        while not _use(target):
            cache.mkdir(parents=True, exist_ok=True)
            with locked(_lock(target)):
                if target.is_dir():  # another process has made it meanwhile
                    continue
                for abandoned in cache.glob(f"*{PARTIAL}"):
                    if abandoned != partial:
                        remove_abandoned(abandoned, _lock(abandoned.with_suffix("")))
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                try:
                    partial.mkdir()
                    fill(partial)
                    partial.rename(target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                _use(target)
                _make_room(cache, limit)
    return target


def _use(target: Path) -> bool:
    """Whether the folder is there, and then stays until this process ends."""
    if not target.is_dir():
        return False
    mark = _mark(target)
    with suppress(OSError):  # a read-only cache is not pruned either
        if target not in _used:
            file = mark.open("ab")
            machine.lock(file, shared=True)
            if not (is_at(mark, file) and target.is_dir()):  # it has just been removed to make room
                file.close()
                return False
            _used[target] = file
        os.utime(mark)
    return True


def _lock(folder: Path) -> Path:
    """Held by the process that makes or removes the folder."""
    return folder.with_name(f"{folder.name}.lock")


def _mark(folder: Path) -> Path:
    """Held by those who use the folder; its time is that of the last use."""
    return folder.with_name(f"{folder.name}.used")


def _make_room(cache: Path, limit: float) -> None:
    size = lambda folder: sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
    sizes = {folder: size(folder) for folder in cache.iterdir() if _NAME.fullmatch(folder.name)}
    excess = sum(sizes.values()) - limit
    last_use = lambda folder: (_mark(folder) if _mark(folder).exists() else folder).stat().st_mtime
    for folder in sorted(sizes, key=last_use):
        if excess <= 0:
            return
        with locked(_lock(folder), wait=False) as complete, locked(_mark(folder), wait=False) as unused:
            if complete and unused:
                partial = folder.with_name(f"{folder.name}{PARTIAL}")  # what is half removed is not the folder
                folder.rename(partial)
                shutil.rmtree(partial, ignore_errors=True)
                excess -= sizes[folder]
