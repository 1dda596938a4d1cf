"""One shard: decode, crop, draw, degrade, encode, tar; then the record that commits it. A function of its plan."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deedsr.dataset.codecs import EXTENSIONS, decode_stored, encode
from deedsr.dataset.crops import CropPlace, choose_crops, cut
from deedsr.dataset.keys import content_key, generator, sample_key
from deedsr.dataset.pictures import RejectedImage, decode
from deedsr.dataset.tar import TarWriter
from deedsr.degradation.chain import degrade
from deedsr.degradation.draws import draw_degradation, scalar_parameters
from deedsr.degradation.recipe import Recipe
from pipelines.shards.plan import ShardPlan
from pipelines.shards.sources import Source, split_uri
from pipelines.storage import Storage, open_storage

__all__ = ["ShardRecord", "build_shard", "read_record", "record_path"]


@dataclass(frozen=True)
class ShardRecord:
    """What commits a shard: `_state/{id of its plan}.json`, written after the tar is in place.

    `name` is empty, and there is no tar, if all sources were rejected. `sources`: {path: SHA-256 of the file, or None
    if it could not be read}. `rows`: what `samples.parquet` says of each sample, but for what the plan says.
    `rejected`: the shard's lines of `rejected.jsonl`.
    """

    name: str
    sha256: str
    bytes: int
    samples: int
    sources: dict[str, str | None]
    rows: list[dict[str, Any]]
    rejected: list[dict[str, Any]]


def record_path(plan: ShardPlan) -> str:
    return f"_state/{plan.id}.json"


def read_record(plan: ShardPlan, out: Storage) -> ShardRecord:
    """Raises FileNotFoundError if the shard is not committed."""
    return ShardRecord(**json.loads(out.read(record_path(plan))))


def build_shard(plan: ShardPlan, recipe: Recipe, out: Storage) -> ShardRecord:
    """Writes the tar of a plan, then its record. Equal plan, recipe and files: equal bytes, wherever and whenever."""
    cv2.setNumThreads(1)  # one task has one CPU
    sources: dict[str, str | None] = {}
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    with tempfile.NamedTemporaryFile(prefix="deedsr-", suffix=".tar") as file:
        tar = TarWriter(file)
        for source in plan.sources:
            rejection = {"kind": "source", "root": source.root, "source": source.path}
            sources[source.path] = None
            try:
                data = _read(source)
                sources[source.path] = sha256 = hashlib.sha256(data).hexdigest()
                rng = generator("crops", recipe.seed, source.root, source.path)
                image = decode(data, source.path)
                places, smooth = choose_crops(image, recipe.crop, rng)
            except RejectedImage as reason:
                rejected.append({**rejection, "reason": str(reason)})
                continue
            for place in smooth:
                rejected.append({**rejection, "kind": "crop", "reason": "too little texture", "crop": _crop(place)})
            for place in places:
                flip = bool(rng.random() < recipe.flip)
                rows += _write_variants(tar, cut(image, place), place, flip, source, sha256, recipe)
        if not rows:
            record = ShardRecord("", "", 0, 0, sources, rows, rejected)
        else:
            sha256 = tar.finish()
            name = f"{plan.split}-{plan.number}-{sha256[:12]}.tar"
            out.write(name, Path(file.name))
            record = ShardRecord(name, sha256, tar.size, len(rows), sources, rows, rejected)
    out.write(record_path(plan), json.dumps(asdict(record)).encode())
    return record


def _read(source: Source) -> bytes:
    try:
        source.path.encode()
    except UnicodeEncodeError:
        raise RejectedImage("file name is not valid UTF-8") from None
    folder, name = split_uri(source.uri)
    try:
        return open_storage(folder).read(name)
    except FileNotFoundError:
        raise RejectedImage("no such file") from None


def _crop(place: CropPlace) -> list[int]:
    return [place.top, place.left, place.size, place.size]


def _write_variants(
    tar: TarWriter, pixels: np.ndarray, place: CropPlace, flip: bool, source: Source, sha256: str, recipe: Recipe
) -> Iterator[dict[str, Any]]:
    """Adds the samples of one crop, each variant with its own degradation; yields their rows."""
    pixels = np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)
    formats = recipe.formats
    stored = encode(pixels, formats.hr, formats.hr_quality)
    # The LR is made from the HR as stored, so that the pair is true to itself and replays from the tar.
    hr = decode_stored(stored) if formats.hr == "jpeg" else pixels
    recipe_digest = recipe.digest
    content = content_key(source.root, source.path, place.top, place.left)
    for variant in range(recipe.variants):
        key = sample_key(content, variant)
        seed = int(generator("sample", recipe.seed, key).integers(2**63))
        draws = draw_degradation(recipe.degradation, hr.shape[:2], recipe.scale, generator("degradation", seed))
        info = {
            "source": {"root": source.root, "path": source.path, "sha256": sha256},
            "crop": _crop(place),
            "flip": flip,
            "variant": variant,
            "seed": seed,
            "recipe_digest": recipe_digest,
            "degradation": draws,
        }
        row: dict[str, Any] = {
            "key": key,
            "content": content,
            "variant": variant,
            "source": source.path,
            "source_sha256": sha256,
            "top": place.top,
            "left": place.left,
            "height": place.size,
            "width": place.size,
            "flip": flip,
            "hr_ext": EXTENSIONS[formats.hr],
            "lr_ext": EXTENSIONS[formats.lr],
        }
        members = {
            "hr": (f"{key}.hr.{EXTENSIONS[formats.hr]}", stored),
            "lr": (f"{key}.lr.{EXTENSIONS[formats.lr]}", encode(degrade(hr, draws), formats.lr)),
            "json": (f"{key}.json", json.dumps(info, separators=(",", ":"), ensure_ascii=False).encode()),
        }
        for member, (name, data) in members.items():
            row[f"{member}_offset"], row[f"{member}_size"] = tar.add(name, data), len(data)
        # JSON has no NaN: a value that was not drawn is null.
        yield row | {name: None if isnan(value) else value for name, value in scalar_parameters(draws).items()}
