"""Pictures inside tar files, found by the headers alone."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from pipelines.shards.source import Source, is_picture
from pipelines.storage import is_hidden, open_storage, split_uri

__all__ = ["list_tar"]

# What `tarfile` raises for headers that are none.
_BROKEN = (tarfile.TarError, ValueError, ArithmeticError, LookupError)


def list_tar(tar: Source) -> list[Source]:
    """Every picture of the tar at `tar.uri`, in its order; their paths are `tar.path` and their names as they are.

    Links and sparse files are no pictures, nor is `KEY.lr.EXT` beside a `KEY.hr.EXT`: degradation shards give their HR.
    A file that is not a whole tar comes first, as a source that is rejected; the members that are whole are used all
    the same. Of equal names the last counts, as in extracting; the others are rejected.
    """
    members: list[Source] = []
    last: dict[str, int] = {}  # place of each name
    problem = ""
    try:
        folder, name = split_uri(tar.uri)
        with open_storage(folder).open(name) as file:
            for member in _members(file):
                if not member.isreg() or member.issparse() or not is_picture(member.name) or is_hidden(member.name):
                    continue
                if member.name in last:
                    replaced = members[last[member.name]]
                    members[last[member.name]] = replaced._replace(problem="replaced by a later member of that name")
                last[member.name] = len(members)
                path = f"{tar.path}/{member.name}"
                members.append(tar._replace(path=path, size=member.size, offset=member.offset_data))
    except FileNotFoundError:
        problem = "no such file"
    except _BROKEN:
        problem = "not a whole tar file"
    degraded = {f"{tar.path}/{name}" for name in _degraded(set(last))}
    broken = [tar._replace(problem=problem)] if problem else []
    return broken + [member for member in members if member.path not in degraded]


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Whole members. Raises `_BROKEN` where the tar is cut off, ends without a mark or goes on behind it."""
    size = file.seek(0, 2)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        end = 0
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else all headers are held
            if member.offset_data + member.size > size or tar.offset <= end:
                raise tarfile.ReadError("cut off")
            end = tar.offset
            yield member
        file.seek(tar.offset)
        rest = file.read(tarfile.RECORDSIZE)
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            raise tarfile.ReadError("no end mark, or another tar behind it")


def _degraded(names: set[str]) -> Iterator[str]:
    hr = {name.rpartition(".hr.")[0] for name in names if ".hr." in name}
    return (name for name in names if ".lr." in name and name.rpartition(".lr.")[0] in hr)
