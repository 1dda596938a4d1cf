"""One picture of a `--source`, and which names are those of pictures."""

from typing import NamedTuple

__all__ = ["DECODED", "Source", "is_picture"]

DECODED = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
# Formats that are not read are listed all the same: what was given and left out is recorded, with the reason.
_PICTURES = (
    *DECODED,
    *(".jpe", ".jfif", ".gif", ".bmp", ".dib", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jpf", ".jpx", ".jxl"),
    *(".psd", ".tga", ".exr", ".hdr", ".pfm", ".ppm", ".pgm", ".pbm", ".pnm", ".svg", ".ico", ".dng", ".cr2", ".cr3"),
    *(".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
)


class Source(NamedTuple):
    """One picture. `root` is the ordinal of its `--source`, `path` its name below it: what a sample is named after.

    A picture inside a tar or a Parquet table has that file's name as the first part of its `path`, and that file's size
    and version as its `version`: the file is the unit of change.
    """

    root: int
    path: str
    uri: str  # where it lies now: itself, or the file that holds it
    size: int  # bytes; 0 for a row of a Parquet table
    version: str  # changes with the content: modification time or ETag
    container: str = ""  # relative path of the tar or Parquet table that holds it, or names it
    offset: int = -1  # of its first byte in a tar
    row: int = -1  # in a Parquet table
    duplicate: bool = False  # another source with the same content comes first
    lr: str = ""  # where its real LR partner lies
    lr_version: str = ""  # size and version of that
    problem: str = ""  # why it gives no picture, where the listing already says so


def is_picture(path: str) -> bool:
    return path.lower().endswith(_PICTURES)
