"""What a node keeps below `machine.cache_folder()`: folders of models, fetched once for all processes.

`DEEDSR_CACHE_GB` (50) is how much they may take, in 1e9 bytes. When one is added, those unused for longest make room;
what a living process has asked for stays, whatever it takes. Copies of shards have a folder and a limit of their own
(`train.cache_gb`).
"""

import math
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from deedsr.errors import UsageError
from pipelines import machine
from pipelines.storage.errors import explained
from pipelines.storage.lock import PARTIAL, is_at, locked

__all__ = ["kept"]

VARIABLE = "DEEDSR_CACHE_GB"
_GB = 50.0
_NAME = re.compile("[0-9a-f]{64}")
_ABANDONED_SECONDS = 86400.0
_used: dict[Path, IO[bytes]] = {}  # by this process: files beside the folders, under a shared lock while it lives


def kept(name: str, fill: Callable[[Path], object]) -> Path:
    """The folder `name` (a SHA-256) of this node's cache; `fill` makes it in one process, while others that want it
    wait. It stays as long as this process lives."""
    cache = machine.cache_folder() / "deedsr"
    target = cache / name
    limit = _limit()
    with explained("write", str(target)):
        while not _use(target):
            cache.mkdir(parents=True, exist_ok=True)
            with locked(cache / f"{name}.lock"):
                if not target.is_dir():  # no other process has made it meanwhile
                    _remove_abandoned(cache)
                    _fill(target, fill)
                    _use(target)
                    _make_room(cache, limit)
    return target


def _fill(target: Path, fill: Callable[[Path], object]) -> None:
    partial = target.with_name(f"{target.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        fill(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _limit() -> float:
    """Bytes. Raises UsageError if the variable holds no number."""
    text = os.environ.get(VARIABLE) or str(_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise UsageError(f"{VARIABLE} must be a number of 1e9 bytes, 0 or more, got {text!r}")
    return limit * 1e9


def _use(target: Path) -> bool:
    """Whether the folder is there, and then stays until this process ends."""
    if not target.is_dir():
        return False
    mark = _mark(target)
    with suppress(OSError):  # where nothing can be written, nobody removes anything either
        if target not in _used:
            file = mark.open("ab")
            machine.lock(file, shared=True)
            if not (is_at(mark, file) and target.is_dir()):  # it has just made room
                file.close()
                return False
            _used[target] = file
        os.utime(mark)
    return True


def _mark(folder: Path) -> Path:
    """Held by those who use the folder; its time is that of the last use."""
    return folder.with_name(f"{folder.name}.used")


def _make_room(cache: Path, limit: float) -> None:
    sizes = {folder: _size(folder) for folder in cache.iterdir() if _NAME.fullmatch(folder.name)}
    excess = sum(sizes.values()) - limit
    for folder in sorted(sizes, key=_last_use):
        if excess <= 0:
            return
        if _removed(folder):
            excess -= sizes[folder]


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())


def _last_use(folder: Path) -> float:
    mark = _mark(folder)
    return (mark if mark.exists() else folder).stat().st_mtime


def _removed(folder: Path) -> bool:
    """False for one that is used."""
    lock = folder.with_name(f"{folder.name}.lock")
    with locked(lock, wait=False) as still, locked(_mark(folder), wait=False) as unused:
        if still and unused:
            partial = folder.with_name(f"{folder.name}{PARTIAL}")  # what is half removed is not the folder
            folder.rename(partial)
            shutil.rmtree(partial, ignore_errors=True)
        return still and unused


def _remove_abandoned(cache: Path) -> None:
    """Removes what killed processes were downloading of other folders: nobody holds their locks any more."""
    for partial in cache.glob(f"*{PARTIAL}"):
        name = partial.name.removesuffix(PARTIAL)
        if "." in name:  # an earlier version's, which took no lock
            if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)
            continue
        with locked(cache / f"{name}.lock", wait=False) as mine:
            if mine:
                shutil.rmtree(partial, ignore_errors=True)
