"""`manifest.json`: what a dataset holds. It is written last, so a folder without one is not a dataset."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from pydantic import Field, StrictInt, TypeAdapter, ValidationError

from deedsr.errors import DeeDSRError

MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
REJECTED = "rejected.jsonl"
STATE = "_state"  # folder of what only generation needs
FORMAT_VERSION = 2
# Readers make paths of names and hashes: none may lead out of the dataset's folder.
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
SHA256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class ShardEntry:
    """One tar file: its name, number of samples, size in bytes and SHA-256."""

    name: FileName
    samples: StrictInt
    bytes: StrictInt
    sha256: SHA256


@dataclass(frozen=True)
class HRSource:
    """Where the HR images of a dataset without HR lie: another dataset, by its digest, and its place.

    `uri` is relative to the dataset that names it where both lie in the same place, so that they may move together.
    """

    digest: str
    uri: str


@dataclass(frozen=True)
class LatentsSource:
    """Dataset and networks that the latents were made with; a training must use the same.

    `dataset`: digest of the dataset with the pixels, whose keys, splits and order of samples these shards have; `uri`:
    its place, as in `HRSource`. `vae`, `learner`: SHA-256 over configuration and weights; no learner, no vectors: then
    the LR images are kept for one. `factor`: pixels per latent pixel and side; `channels`: of the latents.
    """

    dataset: str
    uri: str
    vae: str
    learner: str | None
    precision: str
    factor: int
    channels: int


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    `given` = `used` + `rejected` counts sources; crops that were left out of used sources are in `rejected.jsonl`
    only. `hr_from`: the dataset that holds the HR images, None if this one does. `latents`: None for a dataset of
    pixels. `shards` are in the order of (root, split, hash of their first source), and come last in the file. `files`
    maps `samples.parquet` and `rejected.jsonl` to their SHA-256. Only `digest`, `recipe_digest` and `source_digest`
    are promised to be equal for equal recipe and sources; `files` also cover where the sources lay.
    """

    format_version: int
    created_by: str
    recipe: dict[str, Any]
    recipe_digest: str
    source_digest: str
    given: int
    used: int
    rejected: int
    samples: int
    digest: str
    libraries: dict[str, str]
    files: dict[FileName, SHA256]
    hr_from: HRSource | None
    latents: LatentsSource | None = None  # missing in manifests of earlier releases
    shards: tuple[ShardEntry, ...] = ()

    def to_json(self) -> bytes:
        return b"".join(self.json_lines(json.dumps(asdict(shard)) for shard in self.shards))

    def json_lines(self, shards: Iterable[str]) -> Iterator[bytes]:
        """The manifest in pieces, with `shards`, each a JSON text, in place of `self.shards`."""
        about = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "shards"}
        about["hr_from"] = self.hr_from and asdict(self.hr_from)
        about["latents"] = self.latents and asdict(self.latents)
        yield json.dumps(about, indent=1, ensure_ascii=False)[:-2].encode() + b',\n "shards": ['
        for number, shard in enumerate(shards):
            yield (",\n  " if number else "\n  ").encode() + shard.encode()
        yield b"\n ]\n}\n"

    @classmethod
    def from_json(cls, data: bytes, uri: str) -> "Manifest":
        """Reads and checks a manifest; `uri` names it in the DeeDSRError that a broken or newer one raises."""
        try:
            content = json.loads(data)
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise DeeDSRError(
                    f"{uri} has format version {version}, this deedsr reads {FORMAT_VERSION}: "
                    "use the release that wrote it, or generate the dataset again"
                )
            manifest = TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise DeeDSRError(f"{uri} is not a manifest of a dataset ({place}: {problem['msg']})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DeeDSRError(f"{uri} is not a manifest of a dataset ({type(error).__name__}: {error})") from error
        if manifest.digest != dataset_digest(shard.sha256 for shard in manifest.shards):
            raise DeeDSRError(f"{uri} was altered: its digest does not follow from its shards; generate it again")
        return manifest


def dataset_digest(shard_hashes: Iterable[str]) -> str:
    """SHA-256, hexadecimal, over the shards' hexadecimal SHA-256 in the manifest's order, one a line."""
    digest = hashlib.sha256()
    for sha256 in shard_hashes:
        digest.update(f"{sha256}\n".encode())
    return digest.hexdigest()


def kept_copy(name: str, sha256: str) -> str:
    """Where `samples.parquet` or `rejected.jsonl` also lie, under a name whose content never changes.

    Generating again overwrites both before it replaces the manifest; the older manifest's readers find these.
    """
    return f"{STATE}/{sha256[:12]}-{name}"
