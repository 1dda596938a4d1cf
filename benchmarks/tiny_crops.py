"""The 24 validation crops that `tiny` is reported on: 512 px, textured, of the six validation photographs.

    python -m benchmarks.tiny_crops --photos DIR [--out benchmarks/crops]

Cuts them from the photographs at full size: cells of a grid that pass the recipes' rule for texture (`choose_crops`),
four of each photograph where it has as many, and the others' fifth ones and so on where it has not. They are stored
without loss, so that a clone measures the very pixels. A file's name says which crop it is of its photograph, and where
it lies there.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from deedsr.dataset.crops import choose_crops, cut
from deedsr.dataset.keys import generator
from deedsr.dataset.pictures import RejectedImage, decode
from deedsr.dataset.recipe import load_recipe
from tools.tiny.photographs import VALIDATION

SIDE, COUNT = 512, 24
SHIPPED = Path(__file__).parent / "crops"


@dataclass(frozen=True)
class ValidationCrop:
    """`name` as in ORDINAL-PHOTOGRAPH-TOP-LEFT; `hr` uint8 RGB (512, 512, 3)."""

    name: str
    hr: np.ndarray


def cut_crops(photos: Path) -> list[ValidationCrop]:
    """The crops of the photographs in a folder, every photograph's first one first."""
    rule = load_recipe("deedsr").crop.model_copy(update={"size": SIDE, "per_source": COUNT})
    found: list[ValidationCrop] = []
    for photograph in VALIDATION:
        paths = sorted(p for p in photos.glob(f"*{photograph}*") if p.suffix.lower() in (".jpg", ".png"))
        if len(paths) != 1:
            raise SystemExit(f"{photos} holds {len(paths)} pictures of the name {photograph}, not one")
        picture = decode(paths[0].read_bytes(), paths[0].name)
        try:
            places, _ = choose_crops(picture, rule, generator("tiny crops", photograph))
        except RejectedImage as reason:
            print(f"{paths[0].name}: {reason}")
            continue
        for ordinal, place in enumerate(places):
            name = f"{ordinal:02d}-{photograph}-{place.top}-{place.left}"
            found.append(ValidationCrop(name, np.ascontiguousarray(cut(picture, place))))
    return sorted(found, key=lambda crop: crop.name)[:COUNT]


def read_crops(folder: Path = SHIPPED) -> list[ValidationCrop]:
    """The crops that `write_crops` stored, in the same order."""
    return [ValidationCrop(path.stem, np.asarray(Image.open(path))) for path in sorted(folder.glob("*.webp"))]


def write_crops(crops: list[ValidationCrop], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for crop in crops:
        Image.fromarray(crop.hr).save(folder / f"{crop.name}.webp", lossless=True, quality=100, method=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with the validation photographs")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    asked = parser.parse_args()
    crops = cut_crops(asked.photos)
    write_crops(crops, asked.out)
    total = sum(path.stat().st_size for path in asked.out.glob("*.webp"))
    print(f"{len(crops)} crops in {asked.out}, {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
