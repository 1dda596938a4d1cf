"""Sources of equal content, found by reading all of them once, before they are planned."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from deedsr.dataset.pictures import RejectedImage
from deedsr.errors import DeeDSRError
from pipelines import cluster
from pipelines.shards.source import Source, read_source

__all__ = ["mark_duplicates"]

_FEW = 2_000  # sources that one process reads in less time than a cluster needs to start
_CHUNK = 256  # sources of one task
_WINDOW = 400  # tasks known to Ray at a time: what the driver holds of the listing
_THREADS = 16  # of a task: reading is mostly waiting
_HASH = 16  # bytes: that two of ten million contents look the same has a probability of 1e-25


def mark_duplicates(sources: Iterable[Source], workers: int | None, progress: bool = False) -> Iterator[Source]:
    """The same sources in the same order; of those with equal content, all but the first by (root, path) are marked.

    Content is the bytes of the file, and for a real pair those of its LR partner as well. What cannot be read is no
    duplicate. `workers`: tasks at a time, None for every CPU of the cluster; a few sources are read right here. Held
    are 16 bytes for each source, and one name for each content that there is twice. Raises what listing and reading
    raise, DeeDSRError if the cluster fails.
    """
    with tempfile.TemporaryFile(prefix="deedsr-sources-") as listing:
        count = 0
        for source in sources:
            listing.write(json.dumps(source).encode() + b"\n")
            count += 1
        contents = _contents(listing, count, workers, progress)
        first: dict[int, tuple[int, str, int]] = {}
        for number, source in enumerate(_sources(listing)):
            if (content := int(contents[number])) >= 0:
                here = (source.root, source.path, number)
                first[content] = min(first.get(content, here), here)
        for number, source in enumerate(_sources(listing)):
            content = int(contents[number])
            yield source._replace(duplicate=content >= 0 and first[content][2] != number)


def _sources(listing: IO[bytes]) -> Iterator[Source]:
    listing.seek(0)
    return (Source(*json.loads(line)) for line in listing)


def _contents(listing: IO[bytes], count: int, workers: int | None, progress: bool) -> np.ndarray:
    """For each source the number of its content, int64; -1 for what no other source holds, or cannot be read."""
    hashes = np.zeros((count, _HASH), np.uint8)
    read = np.zeros(count, bool)
    with tqdm(total=count, unit="source", desc="duplicates", disable=not progress, leave=False) as bar:
        for row in _hashed_here(listing) if count <= _FEW else _hashed_by_ray(listing, workers):
            part = slice(row["start"], row["start"] + len(row["read"]))
            read[part] = np.frombuffer(row["read"], bool)
            hashes[part] = np.frombuffer(row["hashes"], np.uint8).reshape(-1, _HASH)
            bar.update(len(row["read"]))
    contents = np.full(count, -1, np.int64)
    if read.any():
        _, number, occurrences = np.unique(hashes[read], axis=0, return_inverse=True, return_counts=True)
        contents[read] = np.where(occurrences[number] > 1, number, -1)
    return contents


Row = dict[str, Any]


def _chunks(listing: IO[bytes]) -> Iterator[Row]:
    """Parts of the listing, each with the number of its first source."""
    listing.seek(0)
    start = 0
    while lines := list(islice(listing, _CHUNK)):
        yield {"start": start, "lines": b"".join(lines)}
        start += len(lines)


def _hashed_here(listing: IO[bytes]) -> Iterator[Row]:
    return map(_hash_chunk, _chunks(listing))


def _hashed_by_ray(listing: IO[bytes], workers: int | None) -> Iterator[Row]:
    data = cluster.data()
    from ray.exceptions import RayError

    chunks = _chunks(listing)
    try:
        while window := list(islice(chunks, _WINDOW)):
            tasks = data.TaskPoolStrategy(size=workers and min(workers, len(window)))
            rows = data.from_items(window, override_num_blocks=len(window))
            for row in rows.map(_hash_chunk_as_value, num_cpus=1, compute=tasks).iter_rows():
                cluster.raise_error(row)
                yield row
    except RayError as error:
        last = cluster.last_words(error, "--workers with a smaller number needs less")
        raise DeeDSRError(f"looking for duplicates failed: {last}; run the same command again") from error


def _hash_chunk_as_value(row: Row) -> Row:
    try:
        return _hash_chunk(row) | cluster.error_values()
    except DeeDSRError as error:
        return {"start": 0, "read": b"", "hashes": b""} | cluster.error_values(error)


def _hash_chunk(row: Row) -> Row:
    sources = [Source(*json.loads(line)) for line in row["lines"].splitlines()]
    # What lies in one container is read in its order, by one thread.
    runs = [list(run) for _, run in groupby(sources, key=lambda source: (source.root, source.container or source.path))]
    with ThreadPoolExecutor(_THREADS) as threads:
        hashes = [hash for run in threads.map(lambda run: [*map(_hash, run)], runs) for hash in run]
    return {
        "start": row["start"],
        "read": bytes(hash is not None for hash in hashes),
        "hashes": b"".join(hash or bytes(_HASH) for hash in hashes),
    }


def _hash(source: Source) -> bytes | None:
    """None for what cannot be read."""
    try:
        data, lr_data = read_source(source)
    except (FileNotFoundError, RejectedImage):
        return None
    hash = hashlib.sha256(data)
    if lr_data is not None:
        hash.update(hashlib.sha256(lr_data).digest())
    return hash.digest()[:_HASH]
