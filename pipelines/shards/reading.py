"""From a source to its bytes."""

from collections.abc import Iterator
from contextlib import contextmanager

from deedsr.dataset.pictures import RejectedImage
from deedsr.errors import DeeDSRError
from pipelines.shards.source import Source
from pipelines.shards.tables import is_table, read_row
from pipelines.storage import open_storage, split_uri

__all__ = ["read_source"]


def read_source(source: Source) -> tuple[bytes, bytes | None]:
    """The picture and its real LR partner, if it has one.

    Raises FileNotFoundError if the picture is gone, RejectedImage with the reason where there is none to read.
    """
    if source.problem:
        raise RejectedImage(source.problem)
    with _permitted(known=bool(source.version)):
        data = _picture(source)
    with _permitted(known=not source.lr_version.endswith("-")):
        return data, _partner(source) if source.lr else None


@contextmanager
def _permitted(known: bool) -> Iterator[None]:
    """Turns the error of a file that was unreadable when listed (no version) into its rejection.

    Other errors end the work: a storage that fails for a moment must not change the dataset.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except DeeDSRError:
        if known:
            raise
        raise RejectedImage("no permission to read it") from None


def _picture(source: Source) -> bytes:
    if source.row >= 0 and is_table(source.uri):  # else the row names a file
        return read_row(source)
    folder, name = split_uri(source.uri)
    storage = open_storage(folder)
    if source.offset < 0:
        return storage.read(name)
    return storage.read_range(name, source.offset, source.size) if source.size else b""


def _partner(source: Source) -> bytes:
    folder, name = split_uri(source.lr)
    try:
        return open_storage(folder).read(name)
    except FileNotFoundError:
        raise RejectedImage("no LR partner") from None
