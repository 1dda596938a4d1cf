"""Local directories and S3 prefixes behind the same few calls; what appears under a name is always a whole object."""

from pipelines.storage.errors import Conflict
from pipelines.storage.interface import ANYTHING, Entry, Storage, Upload
from pipelines.storage.local import LocalStorage
from pipelines.storage.location import open_storage
from pipelines.storage.names import is_hidden, leads_out, split_uri
from pipelines.storage.transfer import localize, publish

__all__ = [
    "ANYTHING",
    "Conflict",
    "Entry",
    "LocalStorage",
    "Storage",
    "Upload",
    "is_hidden",
    "leads_out",
    "localize",
    "open_storage",
    "publish",
    "split_uri",
]
