"""Remote shards through copies on the node: fetched once, whole or not at all, within a limit, never waited for."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import FaultProxy

from deedsr.errors import UsageError
from pipelines.data.dataset import Dataset
from pipelines.data.loader import follow, micro_batches
from pipelines.data.order import SampleOrder
from pipelines.data.shard_cache import ShardCache
from pipelines.placement import Nodes, Offer
from pipelines.storage import open_storage, publish
from pipelines.training.config import LearnerOptions, TrainOptions, check
from pipelines.training.placement import place_training

PLENTY = 1 << 30


@pytest.fixture(scope="module")
def remote(small_dataset, bucket) -> str:
    """The small dataset on S3, read only."""
    publish(Path(small_dataset), f"{bucket}/shard-cache")
    return f"{bucket}/shard-cache"


@pytest.fixture
def proxy(s3_server, monkeypatch):
    """Counts what goes over the network."""
    with FaultProxy(s3_server, 0.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def names_of(dataset: Dataset) -> list[str]:
    return [shard.name for shard in dataset.manifest.shards]


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def cached(uri: str, cache: ShardCache) -> Dataset:
    return replace(Dataset.open(uri), through=cache.open)


READER = """
import hashlib, json, sys, time
from dataclasses import replace
from pathlib import Path
from pipelines.data.dataset import Dataset
from pipelines.data.shard_cache import ShardCache
uri, folder, limit, file_size = sys.argv[1:]
if int(file_size):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_size),) * 2)  # writing fails as on a full disk
cache = ShardCache(int(limit), Path(folder))
dataset = replace(Dataset.open(uri), through=cache.open)
index, names = dataset.index(), [shard.name for shard in dataset.manifest.shards]
dataset._shards
cache.need(names)
deadline = time.monotonic() + (3 if int(file_size) else 60)
while not all(map(Path.exists, map(cache.copy, names))) and time.monotonic() < deadline:
    time.sleep(0.02)
digest = hashlib.sha256()
for row in range(index.num_rows):
    digest.update(dataset.read(index, row).hr.tobytes())
print(json.dumps([cache.fetched, cache.ranged, digest.hexdigest()]))
"""


def reader(uri: str, folder: Path, limit: int = PLENTY, file_size: int = 0) -> subprocess.Popen:
    words = [sys.executable, "-c", READER, uri, str(folder), str(limit), str(file_size)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_workers_of_a_node_fetch_each_shard_once_and_read_the_same(remote, proxy, tmp_path):
    dataset = Dataset.open(remote)
    before = proxy.sent
    outputs = [process.communicate(timeout=120) for process in [reader(remote, tmp_path) for _ in range(2)]]
    (fetched, ranged, digest), other = (json.loads(output) for output, _ in outputs)
    assert fetched + other[0] == len(names_of(dataset))
    assert ranged == other[1] == 0
    assert digest == other[2]
    size = sum(shard.bytes for shard in dataset.manifest.shards)
    assert size < proxy.sent - before < 1.5 * size  # with manifest and index, for each
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == sorted(
        f"{s.sha256}.tar" for s in dataset.manifest.shards
    )


def test_half_a_shard_that_a_killed_worker_leaves_never_counts(remote, s3_server, tmp_path, monkeypatch):
    dataset = Dataset.open(remote)
    with FaultProxy(s3_server, lambda number: "slow" if number > 3 else None, slow=60) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        process = reader(remote, tmp_path)
        wait_for(lambda: list(tmp_path.glob("*.partial")))
        process.send_signal(signal.SIGKILL)
        process.wait()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert list(tmp_path.glob("*.partial"))
    next(tmp_path.glob("*.partial")).write_bytes(b"half")
    whole = len(list(tmp_path.glob("*.tar")))  # one may have come before requests were slow
    output, errors = reader(remote, tmp_path).communicate(timeout=120)
    assert json.loads(output)[:2] == [len(names_of(dataset)) - whole, 0], errors
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_is_read_past(remote, small_dataset, tmp_path):
    """Each file may hold 100 kB: copies fail, and every sample comes from the storage."""
    output, errors = reader(remote, tmp_path, file_size=100_000).communicate(timeout=120)
    fetched, ranged, _ = json.loads(output)
    assert (fetched, ranged) == (0, 136), errors
    assert "is read by ranges" in errors
    assert not list(tmp_path.glob("*.tar")) + list(tmp_path.glob("*.partial"))


def test_copies_unused_for_longest_make_room_and_those_needed_now_never_do(remote, tmp_path):
    dataset = Dataset.open(remote)
    shards = sorted(dataset.manifest.shards, key=lambda shard: shard.bytes)[:4]
    limit = shards[-1].bytes + shards[-2].bytes + shards[0].bytes // 2
    copies = lambda: {path.stem for path in tmp_path.glob("*.tar")}
    with ShardCache(limit, tmp_path) as cache:
        cache.open(dataset.storage, dataset.manifest)
        for shard in (shards[0], shards[1], shards[2], shards[3]):
            cache.need([shard.name])
            wait_for(lambda shard=shard: shard.sha256 in copies())
            assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= limit
        assert shards[3].sha256 in copies()
        assert shards[0].sha256 not in copies()
        cache.need([shard.name for shard in shards])  # more than fit: the first ones stay, the others are read by range
        wait_for(lambda: cache._too_big)
        time.sleep(0.3)
        assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= limit
        assert len(copies()) >= 2
        reading = replace(dataset, through=cache.open)
        assert [reading.read(reading.index(), row).key for row in range(136)] == dataset.index()["key"].to_pylist()


def test_a_shard_that_is_not_the_manifests_is_not_kept(remote, small_dataset, bucket, tmp_path, caplog):
    place = f"{bucket}/{tmp_path.name}"
    publish(Path(small_dataset), place)
    dataset = Dataset.open(place)
    shard = dataset.manifest.shards[0]
    data = bytearray(dataset.storage.read(shard.name))
    data[-2000] ^= 1
    open_storage(place).write(shard.name, bytes(data))
    with ShardCache(PLENTY, tmp_path / "copies") as cache:
        cache.open(dataset.storage, dataset.manifest)
        cache.need([shard.name])
        wait_for(lambda: "did not arrive as the manifest has it" in caplog.text)
        assert not list((tmp_path / "copies").glob("*.tar"))


def test_shards_are_fetched_ahead_of_the_sequence(remote, tmp_path):
    """After a window was entered, its shards and the next window's are asked for, over the end of an epoch too."""
    dataset = Dataset.open(remote)
    index = dataset.index("train")
    order = SampleOrder(index, dataset.digest, 0, together=False, window=1)
    shards = np.asarray(index["shard"])
    sequence = [shards[row] for _, row in order.slice(0, 3 * index.num_rows)]
    asked: list[list[str]] = []

    class Asked(ShardCache):
        def need(self, names):
            asked.append(list(names))

    at = follow(Asked(0, tmp_path), order, index)
    for position, shard in enumerate(sequence):
        at(position)
        assert asked[-1][0] == shard
        following = next((s for s in sequence[position:] if s != shard), None)
        assert following in (None, *asked[-1][1:])
    assert len(asked) == 3 * len(set(sequence))
    assert max(map(len, asked)) == 2


def test_batches_come_in_order_for_any_number_of_threads(small_dataset, tmp_path):
    dataset = replace(Dataset.open(small_dataset), through=ShardCache(0, tmp_path).open)
    index = dataset.index("train")
    order = SampleOrder(index, dataset.digest, 0, together=False)

    def batches(threads: int) -> np.ndarray:
        read = lambda epoch, row: {"row": np.int64(row), "lr": dataset.read_lr(index, row)[1]}
        steps = {"first_step": 2, "last_step": 12, "global_batch": 8, "micro": 4, "world_size": 2, "rank": 1}
        return np.concatenate([batch["row"] for batch in micro_batches(order, read, threads=threads, **steps)])

    expected = [row for step in range(2, 12) for _, row in order.slice(8 * step + 4, 8 * step + 8)]
    assert batches(1).tolist() == batches(3).tolist() == expected


def test_impossible_sizes_are_refused_and_the_default_is_two_threads():
    offer = Offer((Nodes(32),), local=True)
    for cpus, threads in ((1, 2), (6, 6), (32, 8)):
        assert place_training(offer, TrainOptions(num_workers=1, cpus_per_worker=cpus)).loader_threads == threads
    assert place_training(offer, TrainOptions(loader_threads=12)).loader_threads == 12
    for name, wrong in (("cache_gb", -1), ("loader_threads", 0)):
        with pytest.raises(UsageError, match=f"train.{name}: .* greater than .*, got {wrong}"):
            check(LearnerOptions(train=TrainOptions(global_batch_size=96, **{name: wrong})))
