"""Whole folders between the local file system and any storage."""

import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from deedsr.errors import UsageError
from pipelines.storage.local import PARTIAL, LocalStorage
from pipelines.storage.location import open_storage
from pipelines.storage.names import makes_a_file
from pipelines.storage.s3 import TRANSFERS

__all__ = ["localize", "publish"]

logger = logging.getLogger(__name__)


def localize(uri: str | Path, without: str = "") -> Path:
    """A local directory with what lies at `uri`: the directory itself, or an S3 prefix downloaded once.

    `without`: a folder below it that is not downloaded.

    Downloads are kept under `$XDG_CACHE_HOME/deedsr` (else `~/.cache/deedsr`) by location and ETags, so that changed
    objects get another directory. An object whose name is that of no file there (absolute, with `..`, too long, or a
    folder's) is left out with a warning. Raises UsageError if there is nothing at `uri`.
    """
    storage = open_storage(uri)
    local = storage.local_path("")
    if local is not None:
        if not local.is_dir():
            raise UsageError(f"{storage.uri} is not a directory" if local.exists() else f"{storage.uri} does not exist")
        return local
    entries = [entry for entry in storage.list() if not (without and entry.path.startswith(f"{without}/"))]
    if not entries:
        raise UsageError(f"there is nothing below {storage.uri}")
    name = hashlib.sha256(repr((storage.uri, [tuple(entry) for entry in entries])).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deedsr"
    target = cache / name
    if target.is_dir():
        return target
    partial = cache / f"{name}.{uuid.uuid4().hex[:12]}{PARTIAL}"
    folders = {str(parent) for entry in entries for parent in PurePosixPath(entry.path).parents}
    files = [entry for entry in entries if makes_a_file(entry.path) and entry.path not in folders]
    for entry in [entry for entry in entries if entry not in files]:
        logger.warning("%s/%s is left out: no file can be called so here", storage.uri, entry.path)
    place = LocalStorage(partial).local_path
    try:
        _each(lambda entry: storage.download(entry.path, place(entry.path)), files)
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


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
