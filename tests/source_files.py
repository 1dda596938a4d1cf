"""Sources for tests: written, listed, made into a dataset."""

import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from deedsr.dataset.manifest import MANIFEST, SAMPLES, kept_copy
from deedsr.dataset.pictures import RejectedImage
from deedsr.dataset.recipe import Recipe
from pipelines.shards import run_job
from pipelines.shards.execute import Job
from pipelines.shards.generate import ShardsResult, source_job
from pipelines.shards.listing import list_sources
from pipelines.shards.shard import Inventory
from pipelines.shards.source import Source, read_source
from pipelines.storage import open_storage


def tar_of(members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def table_of(columns: dict, **options) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def put(files: dict[str, bytes], folder) -> str:
    """Writes files below a folder, local or on S3, and returns its location."""
    storage = open_storage(folder)
    for name, data in files.items():
        storage.write(name, data)
    return storage.uri


def listed(*uris) -> list[Source]:
    return list(list_sources([str(uri) for uri in uris]))


def problems(sources) -> dict[str, str]:
    """Reason by path of every source that gives no bytes."""
    found = {}
    for source in sources:
        try:
            read_source(source)
        except RejectedImage as reason:
            found[source.path] = str(reason)
        except FileNotFoundError:
            found[source.path] = "gone"
    return found


def made(job: Job) -> ShardsResult:
    """The dataset of a job, made in this process: starting Ray's workers would take longer than the work."""
    plans, inventory = list(job.plans()), Inventory.of(job.out)
    for plan in plans:
        if not inventory.holds(plan):
            job.work.build(plan, job.out)
    return run_job(replace(job, plans=lambda: plans), progress=False)


def run(sources, out, recipe, **options) -> ShardsResult:
    return made(source_job([str(source) for source in sources], str(out), recipe, progress=False, **options))


def rejected(out) -> dict[str, str]:
    lines = open_storage(out).read("rejected.jsonl").splitlines()
    return {line["source"]: line["reason"] for line in map(json.loads, lines) if line["kind"] == "source"}


def changed(recipe: Recipe, **fields) -> Recipe:
    return Recipe.model_validate(recipe.model_dump(mode="json") | fields)


def rewritten(dataset: str | Path, target: Path, change, recipe: dict | None = None) -> Path:
    """A copy of a dataset whose index is `change`d, and whose manifest says so."""
    shutil.copytree(dataset, target)
    table = change(pyarrow.parquet.read_table(target / SAMPLES))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=20)
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    (target / kept_copy(SAMPLES, sha256)).write_bytes(buffer.getvalue())
    manifest = json.loads((target / MANIFEST).read_bytes())
    manifest["files"][SAMPLES] = sha256
    manifest["recipe"] |= recipe or {}
    (target / MANIFEST).write_text(json.dumps(manifest))
    return target
