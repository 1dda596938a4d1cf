"""Digests that say which networks a part or a base is."""

import functools
import hashlib
import json
from pathlib import Path

from deedsr.hub.weights import find_variant, weight_files

__all__ = ["base_digest", "part_digest"]


def part_digest(folder: Path) -> str:
    """SHA-256, hexadecimal, over configuration and weights of one part of a model (`vae/`, `learner/`)."""
    return _digest(folder, sorted(folder.glob("[!.]*.safetensors")))


def base_digest(path: Path) -> str:
    """SHA-256, hexadecimal, over what is used of the base in `path`: `vae/`, `unet/` and the scheduler's configuration.

    Only weights that are loaded count: a variant beside the full ones makes no other base.
    """
    digest = hashlib.sha256()
    for folder in (path / "vae", path / "unet"):
        digest.update(_digest(folder, weight_files(folder, find_variant(folder))).encode())
    digest.update(_canonical(path / "scheduler" / "scheduler_config.json"))
    return digest.hexdigest()


def _digest(folder: Path, weights: list[Path]) -> str:
    digest = hashlib.sha256(_canonical(folder / "config.json"))
    for path in weights:
        status = path.stat()
        digest.update(_of_file(path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


def _canonical(config: Path) -> bytes:
    """A configuration without diffusers' own notes: which version wrote it, and where it was loaded from."""
    values = json.loads(config.read_text())
    return json.dumps({k: v for k, v in values.items() if not k.startswith("_")}, sort_keys=True).encode()


@functools.lru_cache(maxsize=64)
def _of_file(path: Path, size: int, modified: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
