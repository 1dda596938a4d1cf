"""Whole folders between the local file system and any storage."""

import hashlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from deedsr.errors import UsageError
from pipelines.storage.cache import kept
from pipelines.storage.local import LocalStorage
from pipelines.storage.location import open_storage
from pipelines.storage.names import makes_a_file
from pipelines.storage.s3 import TRANSFERS

__all__ = ["localize", "publish"]

logger = logging.getLogger(__name__)


def localize(uri: str | Path, wanted: Callable[[str], bool] = lambda path: True) -> Path:
    """A local directory with what lies at `uri`: the directory itself, or an S3 prefix downloaded once.

    `wanted`: whether the object at a path below it is downloaded.

    Downloads are kept under `machine.cache_folder()` by location and ETags, so that changed objects get another
    directory. An object whose name is that of no file there (absolute, with `..`, too long, or a folder's) is left out
    with a warning. Raises UsageError if there is nothing at `uri`.
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
        _each(lambda entry: storage.download(entry.path, place(entry.path)), files)

    return kept(name, download)


def publish(folder: Path, uri: str | Path) -> None:
    """Copies a local directory to `uri`. JSON files go last, outermost at the very end: they vouch for the rest."""
    source, target = LocalStorage(folder), open_storage(uri)
    if target.uri == source.uri:
        return
    paths = [entry.path for entry in source.list()]
    vouching = sorted((path for path in paths if path.endswith(".json")), key=lambda path: -path.count("/"))
    _each(lambda path: target.write(path, source.local_path(path)), [path for path in paths if path not in vouching])
    for path in vouching:
        target.write(path, source.local_path(path))


def _each(transfer: Any, items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(TRANSFERS) as threads:
        for done in [threads.submit(transfer, item) for item in items]:
            done.result()
