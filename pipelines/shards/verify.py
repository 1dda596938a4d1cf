"""Checks a finished dataset: every hash of the manifest, every member of every sample, every row of the index."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from deedsr.dataset.codecs import decode_stored
from deedsr.dataset.manifest import REJECTED, SAMPLES, Manifest, ShardEntry
from deedsr.degradation.recipe import Recipe
from deedsr.errors import DeeDSRError
from pipelines.dataset import Dataset
from pipelines.storage import Storage

__all__ = ["VerifyResult", "verify"]


@dataclass
class VerifyResult:
    """INTERFACE's result of `deedsr verify`: `samples` were read whole; each problem names its shard or sample."""

    ok: bool
    shards: int
    samples: int
    problems: list[str]


def verify(uri: str, progress: bool = True) -> VerifyResult:
    """Reads the dataset at `uri` from end to end. Raises DatasetNotCommitted if there is none."""
    dataset = Dataset.open(uri)
    manifest, recipe, storage = dataset.manifest, dataset.recipe, dataset.storage
    problems = [*_check_manifest(manifest, recipe), *_check_files(manifest, storage)]
    index = None
    try:
        problems += _check_rejected(dataset.file(REJECTED), manifest)
        index = dataset.index()
        problems += _check_index(index, manifest)
    except DeeDSRError as error:
        problems.append(str(error))
    whole = 0

    def check(shard: ShardEntry) -> tuple[int, list[str]]:
        rows = index.filter(pa.compute.equal(index["shard"], shard.name)).to_pylist() if index is not None else None
        return _check_shard(shard, rows, recipe, storage)

    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        tqdm(total=manifest.samples, unit="sample", desc="verify", disable=not progress) as bar,
    ):
        for shard, (good, found) in zip(manifest.shards, threads.map(check, manifest.shards), strict=True):
            whole += good
            problems += found
            bar.update(shard.samples)
    return VerifyResult(not problems, len(manifest.shards), whole, problems)


def _check_manifest(manifest: Manifest, recipe: Recipe) -> Iterator[str]:
    if recipe.digest != manifest.recipe_digest:
        yield "manifest.json: recipe_digest is not that of its recipe (another algorithm version, or it was edited)"
    if sum(shard.samples for shard in manifest.shards) != manifest.samples:
        yield "manifest.json: samples is not the sum of its shards' samples"
    if manifest.used + manifest.rejected != manifest.given:
        yield "manifest.json: used and rejected sources do not add up to those given"


def _check_files(manifest: Manifest, storage: Storage) -> Iterator[str]:
    """The files under their plain names, which other programs read; our own reader has a kept copy of each."""
    for name, sha256 in manifest.files.items():
        try:
            if hashlib.sha256(storage.read(name)).hexdigest() != sha256:
                yield f"{name}: its SHA-256 is not what the manifest says"
        except FileNotFoundError:
            yield f"{name} is missing"


def _check_index(index: pa.Table, manifest: Manifest) -> Iterator[str]:
    if index.num_rows != manifest.samples:
        yield f"{SAMPLES}: {index.num_rows} rows, the manifest counts {manifest.samples} samples"
    if pa.compute.count_distinct(index["key"]).as_py() != index.num_rows:
        yield f"{SAMPLES}: a key stands for more than one sample"


def _check_rejected(data: bytes, manifest: Manifest) -> Iterator[str]:
    sources = sum(json.loads(line)["kind"] == "source" for line in data.splitlines())
    if sources != manifest.rejected:
        yield f"{REJECTED}: {sources} sources, the manifest counts {manifest.rejected}"


def _check_shard(
    shard: ShardEntry, rows: list[dict[str, Any]] | None, recipe: Recipe, storage: Storage
) -> tuple[int, list[str]]:
    """How many samples could be read whole, and what is wrong. `rows`: the shard's part of the index, if any."""
    try:
        data = storage.read(shard.name)
    except FileNotFoundError:
        return 0, [f"{shard.name} is missing"]
    problems = []
    if len(data) != shard.bytes:
        problems.append(f"{shard.name}: {len(data)} bytes, the manifest says {shard.bytes}")
    elif hashlib.sha256(data).hexdigest() != shard.sha256:
        problems.append(f"{shard.name}: its SHA-256 is not what the manifest says")
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                members[member.name] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        problems.append(f"{shard.name}: not a whole tar file ({error})")
    if rows is None:
        rows = _rows_of(members)
    if len(rows) != shard.samples:
        problems.append(f"{shard.name}: {len(rows)} samples, the manifest says {shard.samples}")
    wrong = [problem for row in rows for problem in [_check_sample(row, members, data, recipe)] if problem]
    problems += [f"{shard.name}: {problem}" for problem in wrong]
    extra = len(members) - 3 * len(rows)
    if extra > 0:
        problems.append(f"{shard.name}: {extra} members belong to no sample")
    return len(rows) - len(wrong), problems


def _rows_of(members: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """What the index would say, from the tar itself."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (offset, size) in members.items():
        key, _, rest = name.partition(".")
        member, _, ext = rest.partition(".")
        rows.setdefault(key, {"key": key}).update(
            {f"{member}_offset": offset, f"{member}_size": size} | ({f"{member}_ext": ext} if ext else {})
        )
    return list(rows.values())


def _check_sample(row: dict[str, Any], members: dict[str, tuple[int, int]], data: bytes, recipe: Recipe) -> str | None:
    """What is wrong with one sample, None if nothing is."""
    key = row["key"]
    parts = {}
    for member in ("hr", "lr", "json"):
        name = f"{key}.json" if member == "json" else f"{key}.{member}.{row.get(f'{member}_ext')}"
        place = members.get(name)
        if place is None:
            return f"sample {key} has no member {name}"
        if place != (row[f"{member}_offset"], row[f"{member}_size"]):
            return f"sample {key}: {SAMPLES} points beside its member {name}"
        parts[member] = data[place[0] : sum(place)]
    try:
        hr, lr = decode_stored(parts["hr"]), decode_stored(parts["lr"])
    except ValueError:
        return f"sample {key}: an image cannot be decoded"
    side = recipe.crop.size
    expected = (side, side), (side // recipe.scale, side // recipe.scale)
    if (hr.shape[:2], lr.shape[:2]) != expected:
        return f"sample {key}: HR {hr.shape[:2]} and LR {lr.shape[:2]}, the recipe says {expected[0]} and {expected[1]}"
    try:
        info = json.loads(parts["json"])
        if info["recipe_digest"] != recipe.digest:
            return f"sample {key} was made by another recipe"
    except (ValueError, KeyError, TypeError):
        return f"sample {key}: its JSON cannot be read"
    return None
