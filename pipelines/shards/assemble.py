"""Committed shards become a dataset: `samples.parquet`, `rejected.jsonl`, and last of all `manifest.json`.

Everything is written as a stream, record by record: what is held does not grow with the dataset.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import requires, version
from pathlib import Path

import cv2
import pyarrow as pa
import pyarrow.parquet
from packaging.requirements import Requirement

from deedsr.dataset.manifest import FORMAT_VERSION, MANIFEST, REJECTED, SAMPLES, Manifest, ShardEntry, kept_copy
from deedsr.errors import DeeDSRError
from pipelines.shards.execute import Job
from pipelines.shards.plan import ShardPlan
from pipelines.shards.shard import COLUMNS, LATENTS_COLUMNS, ShardRecord
from pipelines.storage import Conflict, Storage
from pipelines.storage.lock import scratch_folder
from pipelines.storage.waiting import patiently

logger = logging.getLogger(__name__)
# What can change the bytes of a sample besides the recipe and the sources.
_LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "scipy")
_LATENTS_LIBRARIES = ("torch", "diffusers")
_ROWS = 65_536  # of a row group of `samples.parquet`
_TABLES = 256  # held before they are made one: a table of few rows takes 70 KB


def assemble(
    job: Job, planned: Iterable[tuple[ShardPlan, ShardRecord]], expected: str | None
) -> tuple[Manifest, "Sums"]:
    """Writes the dataset's files from its shards in the manifest's order.

    Returns the manifest, its shards left out, and what was counted. `expected`: version of the manifest that this one
    replaces, None if there is to be none. Raises DeeDSRError, and writes nothing, if more than
    `recipe.max_rejected_share` of the sources were rejected or there is no sample; and if another run replaced the
    manifest meanwhile by another dataset, which then stands.
    """
    recipe, out, made_of, latents = job.recipe, job.out, job.made_of, job.latents
    with scratch_folder() as folder:
        samples, rejected, entries, whole = (folder / n for n in (SAMPLES, REJECTED, "shards.jsonl", MANIFEST))
        sums = _write_parts(planned, LATENTS_COLUMNS if latents else COLUMNS, samples, rejected, entries)
        if made_of:  # its sources are those of the other dataset
            sums.given = made_of.manifest.given
            rejected.write_bytes(made_of.file(REJECTED))
            lines = map(json.loads, rejected.read_bytes().splitlines())
            sums.reasons = Counter(line["reason"] for line in lines if line["kind"] == "source")
        rejected_sources = sums.reasons.total()
        if rejected_sources > recipe.max_rejected_share * sums.given or not sums.samples:
            counts = ", ".join(f"{reason}: {count}" for reason, count in sums.reasons.most_common())
            raise DeeDSRError(
                f"{rejected_sources} of {sums.given} sources were rejected ({counts}); recipe {recipe.name} allows a "
                f"share of {recipe.max_rejected_share:g}: mend or remove them, or change the recipe "
                "(max_rejected_share, crop)"
            )
        files = {SAMPLES: samples, REJECTED: rejected}
        hashes = {name: _sha256(path) for name, path in files.items()}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            created_by=f"deedsr {version('deedsr')}",
            recipe=recipe.model_dump(mode="json"),
            recipe_digest=recipe.digest,
            source_digest=made_of.manifest.source_digest if made_of else sums.sources.hexdigest(),
            given=sums.given,
            used=sums.given - rejected_sources,
            rejected=rejected_sources,
            samples=sums.samples,
            digest=sums.digest.hexdigest(),
            libraries={name: version(name) for name in _LIBRARIES + (_LATENTS_LIBRARIES if latents else ())},
            files=hashes,
            hr_from=job.hr_from,
            latents=latents,
        )
        with whole.open("wb") as file, entries.open() as shards:
            file.writelines(manifest.json_lines(line.rstrip("\n") for line in shards))
        for name, path in files.items():
            patiently(out.write, kept_copy(name, hashes[name]), path)
            patiently(out.write, name, path)
        try:
            patiently(out.write, MANIFEST, whole, expected=expected)
        except Conflict:
            _require_same(manifest, out)
    return manifest, sums


def _require_same(manifest: Manifest, out: Storage) -> None:
    """Another run was faster: fine if it made the same dataset, else that one stands, whole, and this is an error."""
    theirs = Manifest.from_json(out.read(MANIFEST), f"{out.uri}/{MANIFEST}")
    if (theirs.digest, theirs.recipe_digest) == (manifest.digest, manifest.recipe_digest):
        return
    for name, sha256 in theirs.files.items():
        out.write(name, out.read(kept_copy(name, sha256)))
    raise DeeDSRError(
        f"another run replaced {out.uri}/{MANIFEST} meanwhile by a dataset of recipe {theirs.recipe['name']}, digest "
        f"{theirs.digest[:12]}: that one stands; to replace it, run the same command again, it reuses its shards"
    )


class Sums:
    """Counted while the parts of a dataset are written."""

    def __init__(self) -> None:
        self.given = self.samples = self.shards = 0
        self.reasons: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()  # samples
        self.digest = hashlib.sha256()  # over the shards' SHA-256, one a line, as `dataset_digest`
        # SHA-256 over root, relative path and content of every source given, in the manifest's order.
        self.sources = hashlib.sha256()


def _write_parts(
    planned: Iterable[tuple[ShardPlan, ShardRecord]], columns: pa.Schema, samples: Path, rejected: Path, entries: Path
) -> Sums:
    sums = Sums()
    held: list[pa.Table] = []
    with (
        pyarrow.parquet.ParquetWriter(samples, columns, compression="zstd") as table,
        rejected.open("w") as lines,
        entries.open("w") as shards,
    ):
        for plan, record in planned:
            for path, sha256 in record.sources:
                sums.given += 1
                sums.sources.update(json.dumps([plan.root, path, sha256]).encode() + b"\n")
            for line in record.rejected:
                sums.reasons.update([line["reason"]] if line["kind"] == "source" else [])
                lines.write(json.dumps(line) + "\n")
            if not record.samples:
                continue
            entry = ShardEntry(record.name, record.samples, record.bytes, record.sha256)
            shards.write(json.dumps(asdict(entry)) + "\n")
            sums.digest.update(f"{record.sha256}\n".encode())
            sums.shards += 1
            sums.samples += record.samples
            sums.splits[plan.split] += record.samples
            held.append(record.rows)
            if len(held) == _TABLES:
                held = [pa.concat_tables(held).combine_chunks()]
            if sum(rows.num_rows for rows in held) >= _ROWS:
                table.write_table(pa.concat_tables(held))
                held.clear()
        if held:
            table.write_table(pa.concat_tables(held))
    return sums


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Libraries that can change a shard's bytes. The lowest and highest version that the package's own requirements allow
# made equal shards.
_OF_BYTES = ("numpy", "opencv-python-headless", "pillow", "scipy", "simplejpeg", "webdataset")


def warn_of_versions() -> None:
    """One line for each of them whose version is outside."""
    for requirement in map(Requirement, requires("deedsr") or ()):
        if requirement.name in _OF_BYTES:
            # Several packages bring OpenCV.
            found = cv2.__version__ if requirement.name.startswith("opencv") else version(requirement.name)
            if not requirement.specifier.contains(found, prereleases=True):
                logger.warning(
                    "shards: %s %s is outside %s, where the bytes of shards are known to be equal",
                    requirement.name, found, requirement.specifier,
                )  # fmt: skip
