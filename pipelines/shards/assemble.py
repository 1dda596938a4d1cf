"""Committed shards become a dataset: `samples.parquet`, `rejected.jsonl`, and last of all `manifest.json`."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from deedsr.dataset.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    REJECTED,
    SAMPLES,
    Manifest,
    ShardEntry,
    dataset_digest,
    kept_copy,
)
from deedsr.degradation.recipe import Recipe
from deedsr.errors import DeeDSRError
from pipelines.shards.build import ShardRecord
from pipelines.shards.plan import ShardPlan
from pipelines.storage import Storage

__all__ = ["assemble"]

# The order of the columns; those of the degradation, all float64, follow.
_COLUMNS = pa.schema(
    [("key", pa.string()), ("content", pa.string()), ("variant", pa.int32()), ("split", pa.string())]
    + [("shard", pa.string()), ("root", pa.int32()), ("source", pa.string()), ("source_uri", pa.string())]
    + [("source_sha256", pa.string())]
    + [(name, pa.int32()) for name in ("top", "left", "height", "width")]
    + [("flip", pa.bool_())]
    + [("hr_ext", pa.string()), ("hr_offset", pa.int64()), ("hr_size", pa.int64())]
    + [("lr_ext", pa.string()), ("lr_offset", pa.int64()), ("lr_size", pa.int64())]
    + [("json_offset", pa.int64()), ("json_size", pa.int64())]
)
# What can change the bytes of a sample besides the recipe and the sources.
_LIBRARIES = ("numpy", "opencv-python-headless", "pillow")


def assemble(plans: Sequence[ShardPlan], records: Sequence[ShardRecord], recipe: Recipe, out: Storage) -> Manifest:
    """Writes the dataset's files; `records` are those of `plans`, in the manifest's order.

    Raises DeeDSRError, and writes nothing, if more than `recipe.max_rejected_share` of the sources were rejected or
    there is no sample.
    """
    rejected = [line for record in records for line in record.rejected]
    given = sum(len(plan.sources) for plan in plans)
    reasons = Counter(line["reason"] for line in rejected if line["kind"] == "source")
    _check_rejected(given, reasons, recipe)
    shards = tuple(
        ShardEntry(record.name, record.samples, record.bytes, record.sha256) for record in records if record.samples
    )
    files = {
        SAMPLES: _parquet(plans, records),
        REJECTED: b"".join(json.dumps(line).encode() + b"\n" for line in rejected),
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    for name, data in files.items():
        out.write(kept_copy(name, hashes[name]), data)
    for name, data in files.items():
        out.write(name, data)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by=f"deedsr {version('deedsr')}",
        recipe=recipe.model_dump(mode="json"),
        recipe_digest=recipe.digest,
        source_digest=_source_digest(plans, records),
        given=given,
        used=given - reasons.total(),
        rejected=reasons.total(),
        samples=sum(shard.samples for shard in shards),
        shards=shards,
        digest=dataset_digest(shard.sha256 for shard in shards),
        libraries={name: version(name) for name in _LIBRARIES},
        files=hashes,
    )
    out.write(MANIFEST, manifest.to_json())
    return manifest


def _check_rejected(given: int, reasons: Counter[str], recipe: Recipe) -> None:
    if reasons.total() <= recipe.max_rejected_share * given and reasons.total() < given:
        return
    counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    raise DeeDSRError(
        f"{reasons.total()} of {given} sources were rejected ({counts}); recipe {recipe.name} allows a share of "
        f"{recipe.max_rejected_share:g}: mend or remove them, or change the recipe (max_rejected_share, crop)"
    )


def _source_digest(plans: Sequence[ShardPlan], records: Sequence[ShardRecord]) -> str:
    """SHA-256 over root, relative path and content of every source given, in the manifest's order."""
    lines = [
        json.dumps([plan.root, path, sha256])
        for plan, record in zip(plans, records, strict=True)
        for path, sha256 in record.sources.items()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _parquet(plans: Sequence[ShardPlan], records: Sequence[ShardRecord]) -> bytes:
    rows: list[dict[str, Any]] = []
    for plan, record in zip(plans, records, strict=True):
        uris = {source.path: source.uri for source in plan.sources}
        place = {"split": plan.split, "root": plan.root, "shard": record.name}
        rows += [{**row, **place, "source_uri": uris[row["source"]]} for row in record.rows]
    degradation = [pa.field(name, pa.float64()) for name in rows[0] if name.startswith("deg_")]
    table = pa.Table.from_pylist(rows, schema=pa.schema([*_COLUMNS, *degradation]))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
