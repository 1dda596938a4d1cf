"""What an output holds beside the dataset that its manifest names: shards of older versions, leftovers of dead runs."""

from dataclasses import dataclass

from deedsr.dataset.manifest import MANIFEST, REJECTED, SAMPLES, STATE, kept_copy
from deedsr.errors import DeeDSRError
from pipelines.claims import DEAD_AFTER
from pipelines.dataset import Dataset
from pipelines.shards.record import Inventory
from pipelines.shards.run import live_runs
from pipelines.storage import open_storage

__all__ = ["Garbage", "collect_garbage"]


@dataclass
class Garbage:
    """Objects removed, and their bytes; writes that were begun and never ended."""

    removed: int
    bytes: int
    uploads: int


def collect_garbage(out: str) -> Garbage:
    """Removes everything below `out` that generation wrote and its manifest does not name.

    Readers of older manifests lose their shards. Raises DatasetNotCommitted where there is no manifest, DeeDSRError
    while a run is at work there: it may be about to name what would be removed.
    """
    dataset = Dataset.open(out)
    storage = open_storage(out)
    if alive := live_runs(storage):
        raise DeeDSRError(
            f"{storage.uri} is being written by {', '.join(alive.values())}: wait for its end. A run that was killed "
            f"on another machine counts as alive for ten minutes: delete {', '.join(alive)} to go on at once"
        )
    shards = {shard.name: (shard.sha256[:12], shard.bytes) for shard in dataset.manifest.shards}
    kept = {MANIFEST, SAMPLES, REJECTED, *shards, *(kept_copy(*file) for file in dataset.manifest.files.items())}
    records = Inventory.of(storage).records
    vouched = set(shards.values())
    garbage: list[str] = []
    size = 0
    for entry in storage.list():
        folder, _, name = entry.path.rpartition("/")
        ours = name.endswith(".tar") if not folder else folder == STATE or folder.startswith(f"{STATE}/")
        if not ours or entry.path in kept:
            continue
        if name.endswith(".arrow") and (key := records.get(name.partition("-")[0])) and (key in vouched or not key[1]):
            continue
        garbage.append(entry.path)
        size += entry.size
    storage.delete_many(garbage)
    return Garbage(len(garbage), size, storage.abort_uploads(DEAD_AFTER))
