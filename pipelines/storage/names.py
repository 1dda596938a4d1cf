"""Names of objects: which may become paths, which are hidden, and how a location splits into storage and path.

Names come from outside (keys of a bucket, manifests, tars, tables), so code that makes a path of one checks it here.
"""

import os
import posixpath

__all__ = ["LONGEST_PART", "is_hidden", "leads_out", "makes_a_file", "split_uri"]

LONGEST_PART = 255  # bytes between two slashes, on nearly every file system


def is_hidden(path: str) -> bool:
    """Whether a part of the relative path is hidden: macOS's `._photo.jpg`, `.thumbnails/photo.png`."""
    return any(part.startswith(".") and part.strip(".") for part in path.split("/"))


def leads_out(path: str) -> bool:
    """Whether a name leads out of its folder: absolute, with `..`, or with a zero byte, which no path has."""
    return path.startswith("/") or "\0" in path or ".." in path.split("/")


def makes_a_file(path: str) -> bool:
    """Whether an object can be copied to a file of its name below a folder, and no other name gives the same file."""
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
