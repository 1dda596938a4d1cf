"""One source to its samples: decode, crop, draw, degrade, encode. Plain functions of their inputs."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from math import isnan
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import cv2
import numpy as np

from deedsr.dataset.assignment import Assignment, assign_degradation
from deedsr.dataset.crops import CropPlace, choose_crops, cut
from deedsr.dataset.keys import content_key, generator, sample_key
from deedsr.dataset.members import EXTENSIONS, decode_stored, encode
from deedsr.dataset.pictures import RejectedImage, decode
from deedsr.dataset.recipe import Recipe
from deedsr.degradation.chain import degrade
from deedsr.degradation.draws import scalar_parameters
from pipelines.data.dataset import SampleInfo
from pipelines.shards.source import Source

Row = dict[str, Any]  # of `samples.parquet`, by column: `pipelines.shards.shard.COLUMNS`

_TURNS = {90: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_CLOCKWISE}


class Rejection(TypedDict):
    """A line of `rejected.jsonl`: a source, or a crop of it, that was left out."""

    kind: Literal["source", "crop"]
    root: int
    source: str  # path below its `--source`
    reason: str
    crop: NotRequired[list[int]]


class Draft(NamedTuple):
    """One sample before it has a place: its members {hr, lr, json: bytes}, of which HR may be missing, and its row."""

    members: dict[str, bytes]
    row: Row


class Crop(NamedTuple):
    """A crop of a source, independent of its degradation; recorded in the members of its samples."""

    content: str
    root: int
    path: str
    sha256: str
    place: list[int]  # top, left, height, width in source pixels
    flip: bool
    rotate: int  # degrees, counterclockwise, after flipping


class Drafts(NamedTuple):
    """Output of one source: SHA-256 of its file (None: not read), samples, and rejections with their reasons."""

    sha256: str | None
    samples: list[Draft]
    rejected: list[Rejection]


class Share(NamedTuple):
    """One of `of` equal ranges of a source's samples, in their order."""

    number: int
    of: int

    def range(self, samples: int) -> range:
        return range(samples * self.number // self.of, samples * (self.number + 1) // self.of)


WHOLE = Share(0, 1)


def samples_of(source: Source, data: bytes, lr_data: bytes | None, recipe: Recipe, share: Share = WHOLE) -> Drafts:
    """A share of the samples of one source, and all that is rejected; never raises for what `data` is."""
    sha256 = hashlib.sha256(data).hexdigest()
    rng = generator("crops", recipe.seed, source.root, source.path)
    s, partner = recipe.scale, None
    try:
        image = decode(data, source.path, recipe.alpha)
        if lr_data is not None:
            partner = decode(lr_data, source.lr, recipe.alpha)
            if partner.shape[:2] != tuple(side // s for side in image.shape[:2]):
                raise RejectedImage("the LR partner is not HR size / scale")
        places, smooth = choose_crops(image, recipe.crop, rng)
    except RejectedImage as reason:
        return Drafts(sha256, [], [rejection(source, str(reason))])
    about = rejection(source, "too little texture")
    rejected: list[Rejection] = [{**about, "kind": "crop", "crop": _corners(place)} for place in smooth]
    each = 1 if partner is not None else recipe.variants_of(source.path)
    shared = groupby(share.range(len(places) * each), key=lambda sample: sample // each)
    variants = {number: [sample % each for sample in of_crop] for number, of_crop in shared}
    samples: list[Draft] = []
    for number, place in enumerate(places):
        flip = bool(rng.random() < recipe.flip)
        rotate = 90 * int(rng.integers(1, 4)) if recipe.rotate and rng.random() < recipe.rotate else 0
        if number not in variants:
            continue
        lr = None
        if partner is not None:
            place = CropPlace(place.top - place.top % s, place.left - place.left % s, place.size)
            lr = _turned(cut(partner, CropPlace(place.top // s, place.left // s, place.size // s)), flip, rotate)
        content = content_key(source.root, source.path, place.top, place.left)
        crop = Crop(content, source.root, source.path, sha256, _corners(place), flip, rotate)
        samples += _stored(crop, _turned(cut(image, place), flip, rotate), lr, recipe, variants[number])
    return Drafts(sha256, samples, rejected)


def rejection(source: Source, reason: str) -> Rejection:
    """The line of `rejected.jsonl` for a whole source."""
    return {"kind": "source", "root": source.root, "source": source.path, "reason": reason}


def _turned(pixels: np.ndarray, flip: bool, rotate: int) -> np.ndarray:
    """A copy, mirrored left to right, then turned counterclockwise by `rotate` degrees."""
    pixels = cv2.flip(pixels, 1) if flip else np.ascontiguousarray(pixels)
    return cv2.rotate(pixels, _TURNS[rotate]) if rotate else pixels


def _corners(place: CropPlace) -> list[int]:
    return [place.top, place.left, place.size, place.size]


def _stored(
    crop: Crop, pixels: np.ndarray, lr: np.ndarray | None, recipe: Recipe, variants: Iterable[int]
) -> Iterator[Draft]:
    """Samples of one crop, HR included."""
    formats = recipe.formats
    stored = encode(pixels, formats.hr, formats.hr_quality)
    if lr is not None:
        drafts: Iterable[Draft] = [_draft(crop, 0, lr, recipe, None)]
    else:
        # The LR is made from the HR as stored, so that it can be recomputed from the tar.
        drafts = degraded(crop, decode_stored(stored) if formats.hr == "jpeg" else pixels, recipe, variants)
    for draft in drafts:
        yield Draft({"hr": stored, **draft.members}, draft.row | {"hr_ext": EXTENSIONS[formats.hr]})


def degraded(crop: Crop, hr: np.ndarray, recipe: Recipe, variants: Iterable[int]) -> Iterator[Draft]:
    """Samples of one crop without their HR: each variant with its own degradation of `hr`, the HR as stored."""
    for variant in variants:
        assignment = assign_degradation(recipe, crop.content, variant, (hr.shape[0], hr.shape[1]))
        lr = degrade(hr, assignment.draws)
        yield _draft(crop, variant, lr, recipe, assignment)


def _draft(crop: Crop, variant: int, lr: np.ndarray, recipe: Recipe, assigned: Assignment | None) -> Draft:
    key = sample_key(crop.content, variant)
    seed, stratum, group, draws = assigned or (None, None, None, None)
    info = SampleInfo(
        source={"root": crop.root, "path": crop.path, "sha256": crop.sha256},
        crop=crop.place,
        flip=crop.flip,
        rotate=crop.rotate,
        variant=variant,
        seed=seed,
        stratum=stratum,
        degradation_group=group,
        recipe_digest=recipe.digest,
        degradation=draws,
    )
    row: Row = {"key": key, "content": crop.content, "variant": variant}
    row |= {"root": crop.root, "source": crop.path, "source_sha256": crop.sha256}
    row |= dict(zip(("top", "left", "height", "width"), crop.place, strict=True))
    row |= {"flip": crop.flip, "rotate": crop.rotate, "stratum": stratum, "degradation_group": group}
    row["lr_ext"] = EXTENSIONS[recipe.formats.lr]
    if draws is not None:
        row |= {name: None if isnan(value) else value for name, value in scalar_parameters(draws).items()}
    text = json.dumps(info, separators=(",", ":"), ensure_ascii=False).encode()
    return Draft({"lr": encode(lr, recipe.formats.lr), "json": text}, row)
