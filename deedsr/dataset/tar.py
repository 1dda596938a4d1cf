"""Tar files whose bytes follow from their members alone, with the place of each member."""

import hashlib
import tarfile
from typing import IO

__all__ = ["TarWriter"]


class TarWriter:
    """Writes a WebDataset tar to an open binary file, hashing as it goes.

    Headers carry no time, user, group or host, so equal members are equal bytes. `webdataset.TarWriter` writes the same
    kind of file but says nothing about where a member lies, which reading a sample alone needs.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0  # bytes written so far

    def add(self, name: str, data: bytes) -> int:
        """Appends a member and returns the offset of its first byte of data."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        header.mode = 0o444
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(data)
        self._pad(tarfile.BLOCKSIZE)
        return offset

    def finish(self) -> str:
        """Writes the end of the archive and returns the SHA-256 of the whole file, hexadecimal."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._pad(tarfile.RECORDSIZE)
        self._file.flush()
        return self._hash.hexdigest()

    def _pad(self, multiple: int) -> None:
        self._write(bytes(-self.size % multiple))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
