"""What an output holds beside the dataset that its manifest names, and which datasets are made of older versions of it.

A derived dataset names the other by place and digest in its manifest (`hr_from`, `latents`). The other one's state
holds a small record for each place that was ever derived from one of its versions. A record only
names the place; the manifest found there decides.
"""

import hashlib
import json
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from deedsr.dataset.manifest import MANIFEST, REJECTED, SAMPLES, STATE, kept_copy
from deedsr.errors import DatasetNotCommitted, DeeDSRError
from pipelines import claims
from pipelines.data.dataset import Dataset, relative_place
from pipelines.reports.tables import bytes_text, count_text
from pipelines.shards.shard import Inventory
from pipelines.storage import Entry, Storage, open_storage
from pipelines.storage.errors import Refused

logger = logging.getLogger(__name__)
DERIVED = f"{STATE}/derived"


class Derived(NamedTuple):
    """A dataset made of a version of another one. `record`: path of its record; `problem`: why its manifest could not
    be read, empty if it was."""

    record: str
    uri: str
    digest: str  # of the version
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.uri} ({self.problem or f'made of the version {self.digest[:12]}'})"


def record_derived(dataset: Dataset, out: Storage) -> None:
    """Writes into the state of `dataset` that what is made in `out` derives from this version of it."""
    place = relative_place(out.uri, dataset.uri)
    about = {"uri": place, "digest": dataset.digest, "host": socket.gethostname()}
    name = f"{hashlib.sha256(place.encode(errors='surrogateescape')).hexdigest()[:16]}-{dataset.digest[:12]}.json"
    try:
        dataset.storage.write(f"{DERIVED}/{name}", json.dumps(about).encode())
    except Refused as error:
        logger.warning(
            "%s; so `deedsr shards --gc --out %s` will not know that %s is made of it", error, dataset.uri, out.uri
        )


def derived_datasets(dataset: Dataset) -> Iterator[Derived]:
    """Datasets whose record is valid: they exist and name the version in it, or are being made.

    One that cannot be read is included, because it may exist.
    """
    for entry in dataset.storage.list(DERIVED):
        try:
            about = json.loads(dataset.storage.read(entry.path))
            uri, digest, host = dataset.located(about["uri"]), about["digest"], about["host"]
        except (ValueError, KeyError, TypeError):
            logger.warning("%s/%s is not a record of a derived dataset and is ignored", dataset.uri, entry.path)
            continue
        found = Derived(entry.path, uri, digest)
        try:
            if _names(uri, digest) or live_runs(open_storage(uri)):
                yield found
            elif "://" not in uri and host != socket.gethostname() and not open_storage(uri).exists(""):
                yield found._replace(problem=f"a folder of {host}, which cannot be seen from here")
        except DeeDSRError as error:
            yield found._replace(problem=f"it cannot be read: {error}")


def _names(uri: str, digest: str) -> bool:
    try:
        manifest = Dataset.open(uri).manifest
    except DatasetNotCommitted:
        return False
    made_of = [manifest.hr_from and manifest.hr_from.digest, manifest.latents and manifest.latents.dataset]
    return digest in made_of


_NAMED = 10  # objects listed by name


def live_runs(out: Storage) -> dict[str, str]:
    """Runs with a heartbeat in the last ten minutes: location of the claim -> host and process.

    Raises DeeDSRError where a claim cannot be read: its run may be at work.
    """
    alive = {}
    for place, claim in claims.found(out):
        if not claim:
            raise DeeDSRError(
                f"{place} is damaged. A run at work writes it again within a minute; if it stays so, delete it"
            )
        if claims.is_alive(claim) and not claim.get("ended"):
            alive[place] = claims.named(claim)
    return alive


class HeldBack(DeeDSRError):
    """Other datasets would lose what they are made of."""

    def __init__(self, uri: str, held_by: list[Derived]):
        self.uri, self.held_by = uri, held_by
        super().__init__(
            f"nothing of {uri} was removed, for other datasets are made of older versions of it: "
            f"{', '.join(map(str, held_by))}. Make them anew by the commands that made them, which reuse what did not "
            "change, or delete them; `--gc --force` removes nevertheless what they are made of"
        )


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
        """Readable summary of what a collection would remove."""
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
        garbage.uploads = len([*storage.abandoned_uploads(claims.DEAD_AFTER)])
        return garbage
    if garbage.held_by and not force:
        raise HeldBack(storage.uri, garbage.held_by)
    storage.delete_many(entry.path for entry in garbage.objects)
    garbage.uploads = storage.abort_uploads(claims.DEAD_AFTER)
    return garbage


def _unnamed(dataset: Dataset, derived: set[str]) -> Iterator[Entry]:
    """What generation wrote and the manifest does not name; `derived`: records that count."""
    shards = {shard.name: (shard.sha256[:12], shard.bytes) for shard in dataset.manifest.shards}
    kept = {MANIFEST, SAMPLES, REJECTED, *shards, *(kept_copy(*file) for file in dataset.manifest.files.items())}
    records = Inventory.of(dataset.storage).records
    committed = set(shards.values())
    for entry in dataset.storage.list():
        folder, _, name = entry.path.rpartition("/")
        ours = name.endswith(".tar") if not folder else folder == STATE or folder.startswith(f"{STATE}/")
        if not ours or entry.path in kept or entry.path in derived:
            continue
        key = records.get(name.partition("-")[0]) if name.endswith(".arrow") else None
        if not key or (key not in committed and key[1]):
            yield entry
