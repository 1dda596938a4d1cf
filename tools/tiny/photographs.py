"""Training photographs of `tiny`: reduced once into one folder, then held on the device, from where crops are taken.

Shape suffixes: B batch, C channels, H W pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from deedsr.errors import UsageError

VALIDATION = ("Green-Maple", "Sea-of-Lanterns", "Yellow-Flower", "Picture_0B", "picosdeeuropa", "libjxl-flower")
LONGEST = 2200  # pixels of the longer side of a reduced photograph
REDUCTION = 0.75  # at least: what a camera or a JPEG encoder smeared is below a pixel afterwards
SCALES = (1.0, 2 / 3, 1 / 2)  # of the reduced photograph, all of them trained on
CELL = 32  # pixels: texture is known by cells of this side
FLAT_STD = 15.0  # 8-bit levels: a crop that deviates less is flat
FLAT_SHARE = 0.1  # of the crops, at any place


def training_files(folders: Sequence[Path]) -> list[Path]:
    """Photographs in `folders` without the validation ones."""
    files = [
        path
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (".jpg", ".png", ".webp")
    ]
    files = [path for path in files if not any(name in path.name for name in VALIDATION)]
    if not files:
        raise SystemExit(f"no training photograph in {', '.join(map(str, folders))}")
    return files


def reduce_photographs(folders: Sequence[Path], to: Path, quality: int) -> None:
    """Write every training photograph once, reduced, as JPEG."""
    to.mkdir(parents=True, exist_ok=True)
    for path in training_files(folders):
        image = np.asarray(Image.open(path).convert("RGB"))
        scale = min(LONGEST / max(image.shape[:2]), REDUCTION)
        reduced = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        Image.fromarray(reduced).save(to / f"{path.stem}.jpg", quality=quality, subsampling=0)


class Photographs:
    """uint8 photographs (C, H, W) on a device, each at several scales; crops are drawn by pixels of all photographs."""

    def __init__(self, folder: Path, device: torch.device, smallest: int = 256):
        if not folder.is_dir():
            raise UsageError(f"{folder} is missing: run the stage photographs first")
        self.images: list[torch.Tensor] = []
        self.places: list[np.ndarray] = []  # of each image: top and left of its textured cells
        for path in training_files([folder]):
            image = np.asarray(Image.open(path).convert("RGB"))
            for scale in SCALES:
                scaled = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
                if min(scaled.shape[:2]) < smallest:
                    continue
                self.places.append(_textured(scaled))
                self.images.append(torch.from_numpy(scaled).permute(2, 0, 1).contiguous().to(device))
        areas = np.array([len(places) for places in self.places], np.float64) ** 0.5  # large ones count for more
        self.shares = areas / areas.sum()

    def crops(self, count: int, side: int, rng: np.random.Generator) -> torch.Tensor:
        """uint8 (count, 3, side, side), randomly flipped, transposed and recoloured."""
        found = []
        for number in rng.choice(len(self.images), size=count, p=self.shares):
            image, places = self.images[number], self.places[number]
            limits = np.array(image.shape[1:]) - side
            if rng.random() < FLAT_SHARE:
                top, left = rng.integers(limits + 1)
            else:  # a textured cell anywhere in the crop
                corner = places[rng.integers(len(places))] - rng.integers(side - CELL + 1, size=2)
                top, left = corner.clip(0, limits)
            crop = image[:, top : top + side, left : left + side]
            if rng.random() < 0.5:
                crop = crop.flip(2)
            if rng.random() < 0.25:
                crop = crop.transpose(1, 2)
            found.append(crop)
        return recolour(torch.stack(found), rng)


def _textured(image: np.ndarray) -> np.ndarray:
    """(N, 2): top and left of the cells that deviate as a textured crop does; all cells where none does."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    rows, columns = (side // CELL for side in grey.shape)
    cells = grey[: rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL)
    textured = cells.std((1, 3)) > FLAT_STD * 0.7
    return CELL * np.argwhere(textured if textured.any() else np.ones_like(textured))


def recolour(x_BCHW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Other colours of uint8 crops: few photographs hold few, and an autoencoder fails on those that it never saw."""
    count = len(x_BCHW)
    order = [rng.permutation(3) if rng.random() < 0.6 else np.arange(3) for _ in range(count)]
    changed = rng.random((count, 1)) < 0.6
    gain, power = (np.where(changed, np.exp(rng.uniform(-0.4, 0.4, (count, 3))), 1.0) for _ in range(2))
    on_device = lambda values: torch.tensor(values, device=x_BCHW.device)
    index = on_device(np.stack(order))[:, :, None, None].expand_as(x_BCHW)
    gain_BC11, power_BC11 = (on_device(values).float()[:, :, None, None] for values in (gain, power))
    levels = x_BCHW.gather(1, index).float() / 255
    return (255 * gain_BC11 * levels**power_BC11).clamp(0, 255).round().byte()


def to_signed(x_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 to floats in [-1, 1]."""
    return x_BCHW.float() / 127.5 - 1
