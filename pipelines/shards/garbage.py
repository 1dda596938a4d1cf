"""What an output holds beside the dataset that its manifest names: shards of older versions, leftovers of dead runs."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from deedsr.dataset.manifest import MANIFEST, REJECTED, SAMPLES, STATE, kept_copy
from deedsr.errors import DeeDSRError
from pipelines.claims import DEAD_AFTER
from pipelines.data.dataset import Dataset
from pipelines.reports.page import bytes_text, count_text
from pipelines.shards.lineage import Derived, derived_datasets
from pipelines.shards.record import Inventory
from pipelines.shards.run import live_runs
from pipelines.storage import Entry

__all__ = ["Garbage", "HeldBack", "collect_garbage"]

_NAMED = 10  # objects, in words


class HeldBack(DeeDSRError):
    """Other datasets would lose what they are made of."""

    def __init__(self, uri: str, held_by: list[Derived]):
        self.uri, self.held_by = uri, held_by
        super().__init__(
            f"nothing of {uri} was removed, for other datasets are made of older versions of it: "
            f"{', '.join(map(str, held_by))}. Make them anew by the commands that made them, which reuse what did not "
            "change, or delete them; `--gc --force` removes nevertheless what they are made of"
        )

    def __reduce__(self) -> tuple[type["HeldBack"], tuple[str, list[Derived]]]:
        return type(self), (self.uri, self.held_by)


@dataclass
class Garbage:
    """Objects that are removed, or would be; writes that were begun and never ended; other datasets that would lose
    what they are made of."""

    objects: list[Entry]
    uploads: int
    held_by: list[Derived] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.objects)

    def text(self) -> str:
        """What a collection would do, for people."""
        if not self.objects and not self.uploads:
            return "nothing to remove"
        shards = [entry.size for entry in self.objects if entry.path.endswith(".tar")]
        others = [entry.size for entry in self.objects if not entry.path.endswith(".tar")]
        lines = [
            f"{count_text(len(sizes))} {kind}{'s' if len(sizes) != 1 else ''}, {bytes_text(sum(sizes))}"
            for kind, sizes in (("shard", shards), ("other object", others))
        ]
        lines += [f"{count_text(self.uploads)} writes that were begun and never ended"] if self.uploads else []
        lines = ["would be removed:", *(f"  {line}" for line in lines)]
        lines += [f"  {entry.path}" for entry in self.objects[:_NAMED]]
        if len(self.objects) > _NAMED:
            lines.append(f"  and {count_text(len(self.objects) - _NAMED)} more; --json names all")
        if self.held_by:
            lines += ["refused without --force, for these would lose what they are made of:"]
            lines += [f"  {derived}" for derived in self.held_by]
        return "\n".join(lines)


def collect_garbage(out: str, *, dry_run: bool = False, force: bool = False) -> Garbage:
    """Removes everything below `out` that generation wrote and its manifest does not name.

    Readers of older manifests lose their shards. `dry_run`: nothing is removed. `force`: even what other datasets are
    made of. Raises DatasetNotCommitted where there is no manifest; DeeDSRError while a run is at work there: it may be
    about to name what would be removed; HeldBack where other datasets are made of it.
    """
    dataset = Dataset.open(out)
    storage = dataset.storage
    if alive := live_runs(storage):
        raise DeeDSRError(
            f"{storage.uri} is being written by {', '.join(alive.values())}: wait for its end. A run that was killed "
            f"on another machine counts as alive for ten minutes: delete {', '.join(alive)} to go on at once"
        )
    derived = list(derived_datasets(dataset))
    garbage = Garbage([*_unnamed(dataset, {one.record for one in derived})], 0)
    if any(entry.path.endswith(".tar") for entry in garbage.objects):
        garbage.held_by = [one for one in derived if one.digest != dataset.digest]
    if dry_run:
        garbage.uploads = len([*storage.abandoned_uploads(DEAD_AFTER)])
        return garbage
    if garbage.held_by and not force:
        raise HeldBack(storage.uri, garbage.held_by)
    storage.delete_many(entry.path for entry in garbage.objects)
    garbage.uploads = storage.abort_uploads(DEAD_AFTER)
    return garbage


def _unnamed(dataset: Dataset, derived: set[str]) -> Iterator[Entry]:
    """What generation wrote and the manifest does not name; `derived`: records that count."""
    shards = {shard.name: (shard.sha256[:12], shard.bytes) for shard in dataset.manifest.shards}
    kept = {MANIFEST, SAMPLES, REJECTED, *shards, *(kept_copy(*file) for file in dataset.manifest.files.items())}
    records = Inventory.of(dataset.storage).records
    vouched = set(shards.values())
    for entry in dataset.storage.list():
        folder, _, name = entry.path.rpartition("/")
        ours = name.endswith(".tar") if not folder else folder == STATE or folder.startswith(f"{STATE}/")
        if not ours or entry.path in kept or entry.path in derived:
            continue
        if name.endswith(".arrow") and (key := records.get(name.partition("-")[0])) and (key in vouched or not key[1]):
            continue
        yield entry
