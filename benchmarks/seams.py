"""Does a picture sampled in tiles show where they meet?

    python -m benchmarks.seams [--model tiny] [--pictures 16] [--side 384] [--tile 192]

Crops of the shipped validation photographs are degraded by DeeDSR's recipe and sampled twice with the same noise, as a
whole and in tiles. Seam energy is the mean gradient across the borders of all tiles over that elsewhere; its ratio,
tiled by whole, is 1 where nothing shows. Borders: where the UNet's tiles begin and end, and where the autoencoder's
cores meet. Two settings: the model's own, and one in which the UNet has the whole say (noise guidance in the first step
only). With --no-overlap tiles do not overlap, which must show. Prints a table and, last, one JSON line.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.sampled import Pair, degraded_crops
from deedsr import DeeDSRPipeline
from deedsr.metrics.fidelity import luma
from deedsr.sampling import tiles
from deedsr.sampling.autoencoder import downsampling_factor

RATIO_GOAL, ERRORS_GOAL = 0.05, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "as the model recommends": {},
    "guided in the first step only": {"num_inference_steps": 8, "noise_guidance_share": 0.0},
}


def seam_energy(image: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> float:
    """Mean gradient of Y across borders over that elsewhere, of a uint8 RGB image (H, W, 3); without seams about 1.

    `rows`, `columns`: borders lie before these rows and columns of pixels. What the picture itself has there counts
    too: compare with a picture that was made as a whole. Raises ValueError where there is no border inside.
    """
    y = luma(image)
    across, elsewhere = [], []
    for axis, borders in ((0, rows), (1, columns)):
        steps = np.abs(np.diff(y, axis=axis))
        at = np.isin(np.arange(1, y.shape[axis]), borders)
        across.append(steps.compress(at, axis).ravel())
        elsewhere.append(steps.compress(~at, axis).ravel())
    crossed = np.concatenate(across)
    if not crossed.size:
        raise ValueError(f"none of the borders {[*rows]} and {[*columns]} lies inside {y.shape[0]}x{y.shape[1]} pixels")
    return float(crossed.mean() / np.concatenate(elsewhere).mean())


def borders(pipe: Any, side: int, tile: int) -> list[int]:
    """Pixels at which a tile of the UNet or a core of the autoencoder begins, the same along both sides."""
    factor, multiple = downsampling_factor(pipe.vae), 2 ** (len(pipe.unet.config["block_out_channels"]) - 1)
    cells, length = tile // (factor * multiple) * multiple, -(-side // (factor * multiple)) * multiple
    mosaic = tiles.Mosaic(length, length, cells, multiple)
    ends = {end for window in mosaic.windows for end in (window.top, window.bottom)}
    return [factor * end for end in sorted(ends | set(range(0, length, cells)))]


def ratios(pipe: Any, pairs: list[Pair], tile: int, settings: dict[str, Any]) -> np.ndarray:
    """Seam energy of the tiled picture over that of the whole one, for each pair."""
    found = []
    for seed, (hr, lr) in enumerate(pairs):
        whole, tiled = (
            np.asarray(
                pipe(lr, tile=size, restoration=1.0, generator=torch.Generator().manual_seed(seed), **settings).images[
                    0
                ]
            )
            for size in (0, tile)
        )
        at = borders(pipe, hr.shape[0], tile)
        found.append(seam_energy(tiled, at, at) / seam_energy(whole, at, at))
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--side", type=int, default=384, help="of a picture, pixels of the output")
    parser.add_argument("--tile", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-overlap", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.no_overlap:
        tiles.OVERLAP = 0
    pipe = DeeDSRPipeline.from_pretrained(asked.model)
    pipe.set_progress_bar_config(disable=True)
    pairs, result = degraded_crops(asked.pictures, asked.side), {}
    print(f"seam energy tiled / whole, {asked.pictures} pictures of {asked.side} px in tiles of {asked.tile} px")
    print(f"{'':32}{'mean':>10}{'std error':>11}{'lowest':>10}{'highest':>10}")
    for name, settings in SETTINGS.items():
        found = ratios(pipe, pairs, asked.tile, settings)
        mean, error = float(found.mean()), float(found.std(ddof=1) / len(found) ** 0.5)
        good = abs(mean - 1) <= min(RATIO_GOAL, ERRORS_GOAL * error)
        print(f"{name:32}{mean:10.4f}{error:11.4f}{found.min():10.4f}{found.max():10.4f}  {'ok' if good else 'MISSED'}")
        result[name] = {"mean": round(mean, 5), "standard_error": round(error, 5), "ok": good}
    print(f"goal: mean within {RATIO_GOAL:.0%} and within {ERRORS_GOAL} standard errors of 1")
    print(json.dumps(vars(asked) | {"ratios": result}))


if __name__ == "__main__":
    main()
