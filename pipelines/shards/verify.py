"""Checks a finished dataset: every hash of the manifest, every member of every sample, every row of the index."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from deedsr.dataset.manifest import REJECTED, SAMPLES, ShardEntry
from deedsr.dataset.members import LATENTS_EXTENSION, decode_stored, encode, unpack
from deedsr.degradation.chain import degrade
from deedsr.errors import DeeDSRError
from pipelines.data.dataset import Dataset
from pipelines.data.index import left_out, require_hr
from pipelines.machine import this_machine
from pipelines.shards.build import Tars, member_of
from pipelines.shards.samples import Row
from pipelines.shards.shard import HashedFile


@dataclass
class VerifyResult:
    """Result of `deedsr verify`. `samples`: read completely; each problem names its shard or sample.

    `replayed`: samples whose LR was made again and is the same.
    """

    ok: bool
    shards: int
    samples: int
    replayed: int
    problems: list[str]


def verify(uri: str, replay: int = 0, progress: bool = True) -> VerifyResult:
    """Reads the dataset at `uri` from end to end. Raises DatasetNotCommitted if there is none.

    `replay`: of so many samples, spread over the dataset, the LR is made again from the stored HR and the recorded
    draws, and compared byte by byte.
    """
    dataset = Dataset.open(uri)
    if replay:
        dataset.require_pixels("--replay")
    manifest = dataset.manifest
    problems = [*_check_files(dataset)]
    whole, index = 0, None
    with suppress(DeeDSRError):
        index = dataset.index()
    try:
        require_hr(dataset)
    except DeeDSRError as error:  # once, and not for each sample
        return VerifyResult(False, len(manifest.shards), 0, 0, [*problems, str(error)])

    check = partial(_check_shard, dataset, index)
    with (
        ThreadPoolExecutor(this_machine().cpus) as threads,
        tqdm(total=manifest.samples, unit="sample", desc="verify", disable=not progress) as bar,
    ):
        for shard, (good, found) in zip(manifest.shards, threads.map(check, manifest.shards), strict=True):
            whole += good
            problems += found
            bar.update(shard.samples)
    replayed = 0
    if replay and index is not None and index.num_rows:
        rows = sorted({int(row) for row in np.linspace(0, index.num_rows - 1, min(replay, index.num_rows))})
        with ThreadPoolExecutor(this_machine().cpus) as threads:
            found_again = list(threads.map(lambda row: _replay(dataset, index, row), rows))
        replayed = sum(problem is None for problem in found_again)
        problems += [problem for problem in found_again if problem]
    return VerifyResult(not problems, len(manifest.shards), whole, replayed, problems)


def _replay(dataset: Dataset, index: pa.Table, row: int) -> str | None:
    """Makes the LR of one sample again from its HR and draws. Returns the problem, None if the bytes are equal."""
    key, shard = index["key"][row].as_py(), index["shard"][row].as_py()
    try:
        sample = dataset.read(index, row)
        if sample.info["degradation"] is None:  # a real pair
            return None
        again = encode(degrade(sample.hr, sample.info["degradation"]), dataset.recipe.formats.lr)
        stored = dataset.storage.read_range(shard, index["lr_offset"][row].as_py(), index["lr_size"][row].as_py())
    except (DeeDSRError, FileNotFoundError) as error:
        return f"sample {key} cannot be replayed ({error})"
    except (ValueError, KeyError, TypeError) as error:
        return f"sample {key} cannot be replayed: its draws are damaged ({type(error).__name__}: {error})"
    return None if again == stored else f"{shard}: sample {key}: its HR and draws give another LR than the stored one"


def _check_files(dataset: Dataset) -> Iterator[str]:
    """Problems of the manifest, and of the files under their plain names, which other programs read."""
    manifest = dataset.manifest
    if dataset.recipe.digest != manifest.recipe_digest:
        yield "manifest.json: recipe_digest is not that of its recipe (another algorithm version, or it was edited)"
    if sum(shard.samples for shard in manifest.shards) != manifest.samples:
        yield "manifest.json: samples is not the sum of its shards' samples"
    if manifest.used + manifest.rejected != manifest.given:
        yield "manifest.json: used and rejected sources do not add up to those given"
    for name, sha256 in manifest.files.items():
        try:
            if hashlib.sha256(dataset.storage.read(name)).hexdigest() != sha256:
                yield f"{name}: its SHA-256 is not what the manifest says"
        except FileNotFoundError:
            yield f"{name} is missing"
    try:
        sources = sum(line.kind == "source" for line in left_out(dataset))
        if sources != manifest.rejected:
            yield f"{REJECTED}: {sources} sources, the manifest counts {manifest.rejected}"
        index = dataset.index()
        if index.num_rows != manifest.samples:
            yield f"{SAMPLES}: {index.num_rows} rows, the manifest counts {manifest.samples} samples"
        if pa.compute.count_distinct(index["key"]).as_py() != index.num_rows:
            yield f"{SAMPLES}: a key stands for more than one sample"
    except DeeDSRError as error:
        yield str(error)


def _check_shard(dataset: Dataset, index: pa.Table | None, shard: ShardEntry) -> tuple[int, list[str]]:
    """Number of samples that are complete, and problems. `index`: the dataset's, if it can be read.

    The shard is read once, from beginning to end, and a sample at a time is held.
    """
    expected: dict[str, Row] | None = None
    if index is not None:
        rows = index.filter(pa.compute.equal(index["shard"], shard.name)).to_pylist()
        expected = {row["key"]: row for row in rows}
    problems: list[str] = []
    good = extra = 0
    seen: set[str] = set()
    try:
        stored = dataset.storage.open(shard.name)
    except FileNotFoundError:
        return 0, [f"{shard.name} is missing"]
    file = HashedFile(stored)
    with stored, Tars(dataset.hr_dataset().storage) as hrs:
        try:
            for key, members in _samples(file):
                row = expected.get(key) if expected is not None else _row_of(key, members)
                if row is None:
                    extra += len(members)
                    continue
                seen.add(key)
                problem = _problem_of(row, members, hrs, dataset)
                good += not problem
                problems += [f"{shard.name}: {problem}"] if problem else []
        except (tarfile.TarError, OSError) as error:
            problems.append(f"{shard.name}: not a whole tar file ({error})")
        while file.read(1 << 20):
            pass
    if file.size != shard.bytes:
        problems.insert(0, f"{shard.name}: {file.size} bytes, the manifest says {shard.bytes}")
    elif file.sha256 != shard.sha256:
        problems.insert(0, f"{shard.name}: its SHA-256 is not what the manifest says")
    problems += [f"{shard.name}: sample {key} is missing" for key in expected or () if key not in seen]
    if len(expected if expected is not None else seen) != shard.samples:
        problems.append(f"{shard.name}: {len(expected or seen)} samples, the manifest says {shard.samples}")
    if extra:
        problems.append(f"{shard.name}: {extra} members belong to no sample")
    return good, problems


class Member(NamedTuple):
    """Rest of its name behind the key, place in the tar, content."""

    ext: str
    offset: int
    data: bytes


def _samples(file: HashedFile) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {`hr`, `lr`, `json`: member}) of each sample of a tar, whose members lie one after the other."""
    with tarfile.open(fileobj=cast(BinaryIO, file), mode="r|") as tar:
        for key, infos in groupby(tar, key=lambda info: info.name.partition(".")[0]):
            members = {}
            for info in infos:
                name, _, ext = info.name.partition(".")[2].partition(".")
                content = tar.extractfile(info)
                members[name] = Member(ext, info.offset_data, content.read() if content else b"")
            yield key, members


def _row_of(key: str, members: dict[str, Member]) -> Row:
    """The row that the index should have, from the tar itself."""
    row: Row = {"key": key}
    for name, member in members.items():
        row |= {f"{name}_ext": member.ext, f"{name}_offset": member.offset, f"{name}_size": len(member.data)}
    return row


def _problem_of(row: Row, members: dict[str, Member], hrs: Tars, dataset: Dataset) -> str | None:
    """What is wrong with one sample: names and places of its members, what they hold, its recipe."""
    key, recipe, source = row["key"], dataset.recipe, dataset.manifest.latents
    own_hr = row.get("hr_shard") == row.get("shard")
    images = () if source and source.learner else ("hr", "lr") if own_hr and not source else ("lr",)
    for name in (*images, *(["latents"] if source else []), "json"):
        ext = LATENTS_EXTENSION if name == "latents" else row.get(f"{name}_ext", "")
        member, called = members.get(name), f"{key}.{name}{ext and '.'}{ext}"
        if member is None or (name != "json" and member.ext != ext):
            return f"sample {key} has no member {called}"
        if (member.offset, len(member.data)) != (row[f"{name}_offset"], row[f"{name}_size"]):
            return f"sample {key}: {SAMPLES} points beside its member {called}"
    try:
        sizes = {name: decode_stored(members[name].data).shape[:2] for name in images}
        latents = unpack(members["latents"].data) if source else None
        if not source and not own_hr:
            sizes["hr"] = decode_stored(member_of(hrs, row, "hr")).shape[:2]
    except ValueError:
        return f"sample {key}: " + ("its latents or its LR cannot be read" if source else "an image cannot be decoded")
    except DeeDSRError as error:
        return f"sample {key}: its HR cannot be read ({error})"
    side = recipe.crop.size
    if source and latents:
        shape = (source.channels, side // source.factor, side // source.factor)
        for name, array in latents._asdict().items():
            if name != "degradation" and array is not None and array.shape != shape:
                return f"sample {key}: {name} {array.shape}, recipe and VAE say {shape}"
        if (latents.degradation is None) == bool(source.learner):
            return f"sample {key} has {'no' if source.learner else 'a'} degradation vector"
    else:
        hr, lr = (side, side), (side // recipe.scale, side // recipe.scale)
        if (sizes["hr"], sizes["lr"]) != (hr, lr):
            return f"sample {key}: HR {sizes['hr']} and LR {sizes['lr']}, the recipe says {hr} and {lr}"
    try:
        made_by = json.loads(members["json"].data)["recipe_digest"]
    except (ValueError, KeyError, TypeError):
        return f"sample {key}: its JSON cannot be read"
    return None if made_by == recipe.digest else f"sample {key} was made by another recipe"
