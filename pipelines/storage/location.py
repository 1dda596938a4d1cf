"""From a location that a user writes to its storage."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from deedsr.errors import UsageError
from pipelines.storage.interface import Storage
from pipelines.storage.local import LocalStorage
from pipelines.storage.s3 import S3Storage

__all__ = ["open_storage"]


def open_storage(uri: str | Path) -> Storage:
    """The storage at `s3://bucket/prefix`, `file:///dir` or a plain path; nothing is created or contacted yet."""
    text = str(uri)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if not text:
        raise UsageError("an empty location: give s3://bucket/prefix, file:///dir or a path")
    if scheme is None:
        return LocalStorage(Path(os.path.expanduser(text)))  # `~nobody.jpg` is a name, and to Path an error
    rest = text[scheme.end() :]
    if scheme[1].lower() == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise UsageError(f"{text} names no local directory: write file:///dir, with three slashes")
        return LocalStorage(Path("/" + unquote(path)))
    if scheme[1].lower() == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise UsageError(f"{text} names no bucket: write s3://bucket/prefix")
        if "@" in bucket or ":" in bucket:  # not repeated in the message, which may be logged
            raise UsageError(
                "an s3:// location holds no keys or port: write s3://bucket/prefix and set the AWS variables"
            )
        return S3Storage(bucket, prefix)
    raise UsageError(
        f"{re.sub('//[^/]*@', '//***@', text)}: locations are s3://bucket/prefix, file:///dir or a path, not {scheme[1]}://"
    )
