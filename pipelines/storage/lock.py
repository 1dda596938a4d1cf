"""A lock between processes, on any node that mounts the folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipelines import machine

__all__ = ["PARTIAL", "is_at", "locked"]

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
            if not is_at(path, file):  # who had the lock before has removed it: to lock that one excludes nobody
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
