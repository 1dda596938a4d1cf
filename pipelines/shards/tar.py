"""WebDataset tars whose bytes follow from their members alone, with the place of each member."""

import hashlib
import tarfile
from typing import IO

__all__ = ["ShardTar"]


class ShardTar:
    """`webdataset.TarWriter` on an open binary file, which is hashed as it is written.

    Headers carry no time, user, group or host, so equal members are equal bytes.
    """

    def __init__(self, file: IO[bytes]):
        from webdataset import TarWriter  # imports torch, which only a process that writes a shard need do

        self._stream = _Hashed(file)
        self._writer = TarWriter(self._stream, user="", group="", mode=0o444, mtime=0, encoder=False)

    @property
    def size(self) -> int:
        """Bytes in the file so far; of the whole archive once it is finished."""
        return self._stream.size

    def add(self, key: str, extension: str, data: bytes) -> int:
        """Appends the member `key.extension` and returns the offset of its first byte of data."""
        self._writer.write({"__key__": key, extension: data})
        blocks = -(-len(data) // tarfile.BLOCKSIZE)  # behind its header, which may take several
        return self._writer.tarstream.offset - blocks * tarfile.BLOCKSIZE

    def finish(self) -> str:
        """Writes the end of the archive, once, and returns the SHA-256 of the whole file, hexadecimal."""
        self._writer.close()
        self._stream.file.flush()
        return self._stream.hash.hexdigest()

    close = finish  # an archive that is given up must not write its buffer when it is collected


class _Hashed:
    """A stream that counts and hashes what goes through to a file."""

    def __init__(self, file: IO[bytes]):
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)
