"""Local directories and S3 prefixes behind the same few calls; what appears under a name is always a whole object."""

from pipelines.storage.errors import Conflict
from pipelines.storage.interface import Entry, Storage, is_hidden, leads_out
from pipelines.storage.location import object_at, open_storage, require_here
from pipelines.storage.lock import scratch_folder
from pipelines.storage.transfer import localize, publish

__all__ = [
    "Conflict",
    "Entry",
    "Storage",
    "is_hidden",
    "leads_out",
    "localize",
    "object_at",
    "open_storage",
    "publish",
    "require_here",
    "scratch_folder",
]
