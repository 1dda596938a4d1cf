"""Memory of sampling in tiles: flat but for the picture itself.

    python -m benchmarks.tile_memory [--model tiny] [--sides 1024 2048 4096] [--tile 512]

Each size is sampled in a process of its own, one UNet step and all that stands around it (learner, encoding, decoding,
colours), and its peak resident memory is read from the kernel. A picture of s pixels a side holds 12 bytes per pixel as
floats and 3 as the result that is handed out; what remains beside that must not grow by more than the latents do.
Prints a table and, last, one JSON line.
"""

import argparse
import json
import resource
import subprocess
import sys

MIB = 2**20
PICTURE_BYTES = 12 + 3 + 3  # per pixel: floats, 8-bit array, Pillow's copy of it
GOAL = 1.25  # peak beside the picture, largest against smallest


def one(model: str, side: int, tile: int) -> dict[str, float]:
    """Peak MiB before and while a picture of `side` pixels is made."""
    import numpy as np
    import torch

    from deedsr import DeeDSRPipeline

    torch.set_num_threads(1)
    pipe = DeeDSRPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    lr = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    picture = pipe(lr, num_inference_steps=1, noise_guidance=0.0, tile=tile).images[0]
    assert picture.size == (side, side)
    return {"loaded": loaded, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(asked.model, asked.one, asked.tile)))
        return
    rows = {}
    print(f"{asked.model} in tiles of {asked.tile} px, MiB")
    print(f"{'side':>6}{'loaded':>9}{'peak':>9}{'picture':>9}{'peak beside it':>16}")
    for side in asked.sides:
        command = [sys.executable, "-m", "benchmarks.tile_memory", "--model", asked.model, "--tile", str(asked.tile)]
        done = subprocess.run([*command, "--one", str(side)], stdout=subprocess.PIPE, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        row["picture"] = PICTURE_BYTES * side**2 / MIB
        row["beside"] = row["peak"] - row["picture"]
        rows[side] = row
        values = (row[name] for name in ("loaded", "peak", "picture"))
        print(f"{side:6}" + "".join(f"{value:9.0f}" for value in values) + f"{row['beside']:16.0f}", flush=True)
    growth = rows[max(rows)]["beside"] / rows[min(rows)]["beside"]
    print(f"beside the picture, largest / smallest: {growth:.2f} (goal {GOAL})")
    print(json.dumps({"model": asked.model, "tile": asked.tile, "mib": rows, "growth": growth, "goal": GOAL}))


if __name__ == "__main__":
    main()
