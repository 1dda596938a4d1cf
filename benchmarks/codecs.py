"""Bytes and time of the formats in which shards could hold images, on textured 512 px crops of the shipped photographs.

    python benchmarks/codecs.py [--crops 17] [--rounds 3]

Prints a table and, last, one JSON line. Times are this thread's processor time, the best of the rounds for each crop;
`decode` is how this project reads, `Pillow` how `webdataset` does. Lossless formats are checked to be so.
"""

import argparse
import io
import json
import time
from functools import partial
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from deedsr.dataset.members import decode_stored, encode
from deedsr.degradation.chain import prepare_worker

SIDE = 512


def opencv(extension, *options):
    return lambda image: cv2.imencode(extension, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def pillow(format, **options):
    def write(image):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format, **options)
        return buffer.getvalue()

    return write


def png(strategy, row_filter):
    """OpenCV's PNG at level 1."""
    return opencv(
        ".png",
        *(cv2.IMWRITE_PNG_COMPRESSION, 1),
        *(cv2.IMWRITE_PNG_STRATEGY, getattr(cv2, f"IMWRITE_PNG_STRATEGY_{strategy}")),
        *(cv2.IMWRITE_PNG_FILTER, getattr(cv2, f"IMWRITE_PNG_FILTER_{row_filter}")),
    )


ARMS = {
    "stored: png": lambda image: encode(image, "png"),
    "stored: webp": lambda image: encode(image, "webp"),
    "stored: jpeg 95": lambda image: encode(image, "jpeg", 95),
    "OpenCV png, its defaults": opencv(".png"),
    **{
        f"OpenCV png 1 {strategy} {row_filter}": png(strategy, row_filter)
        for row_filter in ("SUB", "UP", "AVG", "PAETH")
        for strategy in ("RLE", "HUFFMAN_ONLY", "DEFAULT")
    },
    "Pillow png 1": pillow("PNG", compress_level=1),
    "Pillow png 3": pillow("PNG", compress_level=3),
    "Pillow webp method 0 quality 20": pillow("WEBP", lossless=True, method=0, quality=20),
    "Pillow webp method 1 quality 0": pillow("WEBP", lossless=True, method=1, quality=0),
    "Pillow jpeg 95": pillow("JPEG", quality=95),
}


def textured_crops(count):
    photos = sorted(Path(str(files("deedsr") / "assets" / "photos")).glob("*/*.jpg"))[:count]
    images = [cv2.imread(str(photo), cv2.IMREAD_COLOR_RGB) for photo in photos]
    return [np.ascontiguousarray(image[200 : 200 + SIDE, 300 : 300 + SIDE]) for image in images]


def best_time(call, rounds):
    """Milliseconds."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        call()
        times.append(1000 * (time.thread_time() - start))
    return min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prepare_worker()
    crops, result = textured_crops(options.crops), {}
    print(f"{'mean of a crop':<34}{'kB':>8}{'encode ms':>12}{'decode ms':>12}{'Pillow ms':>12}")
    for name, write in ARMS.items():
        rows = []
        for crop in crops:
            data = write(crop)
            assert "jpeg" in name or np.array_equal(decode_stored(data), crop)
            calls = (
                partial(write, crop),
                partial(decode_stored, data),
                lambda data=data: np.asarray(Image.open(io.BytesIO(data))),
            )
            rows.append([len(data) / 1000, *(best_time(call, options.rounds) for call in calls)])
        size, *times = np.mean(rows, axis=0)
        encode_ms, decode_ms, pillow_ms = (round(value, 2) for value in times)
        result[name] = {"kB": round(size, 1), "encode_ms": encode_ms, "decode_ms": decode_ms, "pillow_ms": pillow_ms}
        print(f"{name:<34}{size:>8.1f}" + "".join(f"{value:>12.2f}" for value in times), flush=True)
    print(json.dumps({"benchmark": "codecs", "side": SIDE, "crops": len(crops), "result": result}))


if __name__ == "__main__":
    main()
