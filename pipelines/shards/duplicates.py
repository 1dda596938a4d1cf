"""Sources of equal content, found by reading all of them once, before they are planned."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, islice
from typing import IO

import numpy as np
from tqdm import tqdm

from deedsr.dataset.pictures import RejectedImage
from pipelines.distribution import distribute
from pipelines.shards.source import Source, read_source

_FEW = 2_000  # sources that one process reads in less time than a cluster needs to start
_CHUNK = 256  # sources of one task
_WINDOW = 400  # tasks submitted to Ray at a time, which bounds what the driver holds of the listing
_THREADS = 16  # of a task: reading is mostly waiting
_HASH = 16  # bytes: that two of ten million contents look the same has a probability of 1e-25


def mark_duplicates(sources: Iterable[Source], workers: int | None, progress: bool = False) -> Iterator[Source]:
    """The same sources in the same order; of those with equal content, all but the first by (root, path) are marked.

    Content is the bytes of the file, and for a real pair those of its LR partner as well. What cannot be read is no
    duplicate. `workers`: tasks at a time, None for every CPU of the cluster; a few sources are read right here. Memory:
    16 bytes per source and a name per duplicated content. Raises what listing and reading raise, DeeDSRError if the
    cluster fails.
    """
    with tempfile.TemporaryFile(prefix="deedsr-sources-") as listing:
        count = 0
        for source in sources:
            listing.write(json.dumps(source).encode() + b"\n")
            count += 1
        contents = _contents(listing, count, workers, progress)
        first: dict[int, tuple[int, str, int]] = {}
        listing.seek(0)
        for number, source in enumerate(_sources(listing)):
            if (content := int(contents[number])) >= 0:
                here = (source.root, source.path, number)
                first[content] = min(first.get(content, here), here)
        listing.seek(0)
        for number, source in enumerate(_sources(listing)):
            content = int(contents[number])
            yield source._replace(duplicate=content >= 0 and first[content][2] != number)


def _sources(lines: Iterable[bytes]) -> Iterator[Source]:
    return (Source(*json.loads(line)) for line in lines)


def _contents(listing: IO[bytes], count: int, workers: int | None, progress: bool) -> np.ndarray:
    """For each source the number of its content, int64; -1 for what no other source holds, or cannot be read."""
    hashes = np.zeros(count, f"S{_HASH}")
    listing.seek(0)
    chunks = ((start, list(islice(listing, _CHUNK))) for start in range(0, count, _CHUNK))
    few = count <= _FEW
    with tqdm(total=count, unit="source", desc="duplicates", disable=not progress, leave=False) as bar:
        for start, found in chain.from_iterable(map(_hashed, chunks)) if few else _on_ray(chunks, workers):
            hashes[start : start + len(found)] = found
            bar.update(len(found))
    _, number, occurrences = np.unique(hashes, return_inverse=True, return_counts=True)
    return np.where((hashes != b"") & (occurrences[number] > 1), number, -1)


Chunk = tuple[int, list[bytes]]  # number of its first source; the lines of some sources, or their hashes


def _on_ray(chunks: Iterator[Chunk], workers: int | None) -> Iterator[Chunk]:
    while window := list(islice(chunks, _WINDOW)):
        yield from distribute(
            _hashed,
            window,
            tasks=workers,
            failure="looking for duplicates failed",
            less="--workers with a smaller number needs less",
        )


def _hashed(chunk: Chunk) -> Iterator[Chunk]:
    start, lines = chunk
    # What lies in one container is read in its order, by one thread.
    container = lambda source: (source.root, source.container or source.path)
    runs = [list(run) for _, run in groupby(_sources(lines), key=container)]
    with ThreadPoolExecutor(_THREADS) as threads:
        yield start, [hash for run in threads.map(lambda run: [*map(_hash, run)], runs) for hash in run]


def _hash(source: Source) -> bytes:
    """Empty for what cannot be read."""
    try:
        data, lr_data = read_source(source)
    except (FileNotFoundError, RejectedImage):
        return b""
    hash = hashlib.sha256(data)
    if lr_data is not None:
        hash.update(hashlib.sha256(lr_data).digest())
    return hash.digest()[:_HASH]
