"""Temporary folders that do not outlive their process, however that ends."""

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.storage.errors import explained
from pipelines.storage.lock import locked

__all__ = ["scratch_folder"]


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder below the temporary folder, removed on leaving.

    What a killed process leaves is removed by whoever enters next on that machine: each folder has a lock file beside
    it, which its process holds as long as it lives.
    """
    root = Path(tempfile.gettempdir())
    _remove_abandoned(root)
    folder = root / f"deedsr-{uuid.uuid4().hex[:12]}"
    with explained("write", str(folder)), locked(folder.with_suffix(".lock")):
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    for lock in root.glob("deedsr-*.lock"):
        with suppress(OSError), locked(lock, wait=False) as mine:  # one of another user may not be opened
            if mine:
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
