"""Datasets that are made of datasets: a dataset records who derives from it, so that `--gc` does not destroy those.

A derived dataset names the other by place and digest in its manifest (`hr_from`, `latents`). The other one's state
holds a small record for each place that was ever derived from one of its versions. A record only says where to look:
what lies there decides.
"""

import hashlib
import json
import logging
import socket
from collections.abc import Iterator
from typing import NamedTuple

from deedsr.dataset.manifest import STATE, Manifest
from deedsr.errors import DatasetNotCommitted, DeeDSRError
from pipelines.data.dataset import Dataset
from pipelines.shards.run import live_runs
from pipelines.storage import Storage, open_storage
from pipelines.storage.errors import Refused

__all__ = ["DERIVED", "Derived", "derived_datasets", "record_derived"]

logger = logging.getLogger(__name__)
DERIVED = f"{STATE}/derived"


class Derived(NamedTuple):
    """A dataset that is made of a version of another one: `record` is the path of the record that says so, `problem`
    why it could not be asked, empty if it says so itself."""

    record: str
    uri: str
    digest: str  # of the version
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.uri} ({self.problem or f'made of the version {self.digest[:12]}'})"


def record_derived(dataset: Dataset, out: Storage) -> None:
    """Writes into the state of `dataset` that what is made in `out` derives from this version of it."""
    place = dataset.place_of(out.uri)
    about = {"uri": place, "digest": dataset.digest, "host": socket.gethostname()}
    name = f"{hashlib.sha256(place.encode(errors='surrogateescape')).hexdigest()[:16]}-{dataset.digest[:12]}.json"
    try:
        dataset.storage.write(f"{DERIVED}/{name}", json.dumps(about).encode())
    except Refused as error:
        logger.warning(
            "%s; so `deedsr shards --gc --out %s` will not know that %s is made of it", error, dataset.uri, out.uri
        )


def derived_datasets(dataset: Dataset) -> Iterator[Derived]:
    """Those whose record still counts: they are there and name the version that it names, or are being made of it.

    One that cannot be read counts: it may be there.
    """
    for entry in dataset.storage.list(DERIVED):
        try:
            about = json.loads(dataset.storage.read(entry.path))
            uri, digest, host = dataset.located(about["uri"]), about["digest"], about["host"]
        except (ValueError, KeyError, TypeError):
            logger.warning("%s/%s is no record of a derived dataset, and left alone", dataset.uri, entry.path)
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
    return digest in _made_of(manifest)


def _made_of(manifest: Manifest) -> list[str]:
    """Digests of the datasets that one is made of."""
    made_of = [manifest.hr_from.digest] if manifest.hr_from else []
    return made_of + ([manifest.latents.dataset] if manifest.latents else [])
