"""Names of objects: what may become a path, what is hidden, and how a location is taken apart.

Names come from outside: keys of a bucket, manifests, tars, tables. Whatever makes a path of one asks here first.
"""

import os
import posixpath

__all__ = ["LONGEST_PART", "is_hidden", "leads_out", "makes_a_file", "split_uri"]

LONGEST_PART = 255  # bytes between two slashes, on nearly every file system


def is_hidden(path: str) -> bool:
    """Whether a part of the relative path is hidden: macOS's `._photo.jpg`, `.thumbnails/photo.png`."""
    return any(part.startswith(".") and part.strip(".") for part in path.split("/"))


def leads_out(path: str) -> bool:
    """Whether a name is none below a folder: absolute, or with `..` in it."""
    return path.startswith("/") or "\0" in path or ".." in path.split("/")


def makes_a_file(path: str) -> bool:
    """Whether an object may be copied to a file of its name below a folder, where no other name means the same file."""
    short = all(len(os.fsencode(part)) <= LONGEST_PART for part in path.split("/"))
    return not leads_out(path) and posixpath.normpath(path) == path and short


def split_uri(uri: str) -> tuple[str, str]:
    """The location of a storage, and the path in it, of one object.

    In S3 the path is the whole key: a prefix would lose the second slash of `photos//a.jpg`.
    """
    if uri.startswith("s3://"):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return f"s3://{bucket}", key
    folder, _, name = uri.rpartition("/")
    return folder or ("/" if uri.startswith("/") else "."), name
