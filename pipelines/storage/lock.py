"""Locks between processes on any node that mounts a folder, and temporary folders that do not outlive their process."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipelines import machine
from pipelines.storage.errors import explained

PARTIAL = ".partial"  # suffix of a file or folder whose writing has not ended; listings leave it out


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """One process at a time; False for another one that does not `wait`.

    `path`: the lock file, made where it is missing and removed on leaving. The lock ends with the process that holds
    it, however that ends.
    """
    while True:
        with path.open("ab") as file:
            if not machine.lock(file, wait):
                yield False
                return
            if not is_at(path, file):  # its last holder has removed the file: another process may lock a new one
                continue
            try:
                yield True
            finally:
                with suppress(PermissionError):  # Windows removes no open file
                    path.unlink()
            return


def is_at(path: Path, file: BinaryIO) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove_abandoned(folder: Path, lock: Path) -> None:
    """Removes a folder whose process was killed: nobody holds its lock any more."""
    with suppress(OSError), locked(lock, wait=False) as free:  # one of another user may not be opened
        if free:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder below the temporary folder, removed on leaving.

    A lock file lies beside each one, held by its process. Whoever enters next on that machine removes the folders of
    killed processes.
    """
    root = Path(tempfile.gettempdir())
    for lock in root.glob("deedsr-*.lock"):
        remove_abandoned(lock.with_suffix(""), lock)
    folder = root / f"deedsr-{uuid.uuid4().hex[:12]}"
    with explained("write", str(folder)), locked(folder.with_suffix(".lock")):
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
