"""Hashes of degraded and encoded images, for tests that compare processors.

The images are made of whole numbers here, so that nothing but the code under test can differ.
"""

import hashlib

import numpy as np

from deedsr.dataset.keys import generator
from deedsr.dataset.members import encode
from deedsr.dataset.recipe import load_recipe
from deedsr.degradation import degrade, draw_degradation

RECIPES = ("deedsr", "realesrgan", "heavy")
SIZES = ((96, 128), (65, 113), (160, 160), (256, 256))
COUNT = 48  # draws of each recipe


def picture(height, width, number):
    """Edges, ramps and grain; uint8 RGB."""
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([(5 + number) * x + 3 * y, 2 * x + 7 * y, x * y // (8 + number)], -1) // 2
    edges = ((x // (9 + number % 5) + y // 13) % 2 * 90)[..., None]
    grain = generator("picture", number).integers(0, 40, (height, width, 3))
    return ((ramps % 160 + edges + grain) % 256).astype(np.uint8)


def every_draw():
    for recipe in RECIPES:
        for index in range(COUNT):
            size = SIZES[index % len(SIZES)]
            clean = {"clean_probability": 1.0 if index == 0 else 0.0}
            ranges = load_recipe(recipe).degradation.model_copy(update=clean)
            yield index, draw_degradation(ranges, size, 4, generator("bytes", recipe, index))


def hashes():
    digests = {name: hashlib.sha256() for name in ("degradation", "png", "webp", "jpeg")}
    for index, draws in every_draw():
        hr = picture(*draws["size"], index)
        lr = degrade(hr, draws)
        digests["degradation"].update(lr.tobytes())
        for name in ("png", "webp", "jpeg"):
            digests[name].update(encode(lr if index % 4 else hr, name))
    return {name: digest.hexdigest()[:16] for name, digest in digests.items()}
