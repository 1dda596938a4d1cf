"""What a `--source` holds: pictures in folders, S3 prefixes, list files, tars and Parquet tables, and real pairs."""

from pipelines.shards.listing import list_sources
from pipelines.shards.pairs import list_pairs
from pipelines.shards.reading import read_source
from pipelines.shards.source import Source
from pipelines.shards.tables import is_table

__all__ = ["Source", "is_table", "list_pairs", "list_sources", "read_source"]
