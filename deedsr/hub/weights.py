"""Weight files of a network in diffusers layout: whole or in shards, in full precision or as a variant such as fp16;
digests of networks."""

import functools
import hashlib
import json
import re
from pathlib import Path

from deedsr.errors import UsageError

NAME = "diffusion_pytorch_model"
_OF_VARIANT = re.compile(rf"{NAME}\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)")


def find_variant(folder: Path) -> str | None:
    """The `variant` by which diffusers loads the weights in `folder`; None for the plain files, which come first.

    Raises UsageError where there are no safetensors, or a shard of them is missing.
    """
    if any((folder / f"{NAME}.safetensors{end}").is_file() for end in ("", ".index.json")):
        variant = None
    else:
        matches = [_OF_VARIANT.fullmatch(path.name) for path in sorted(folder.glob(f"{NAME}.*"))]
        variants = {match[1] or match[2] for match in matches if match}
        if not variants:
            others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".ckpt", ".msgpack"))
            raise UsageError(
                f"{folder} holds no weights: {NAME}.safetensors is missing"
                + (f" ({others[0]} is not read: save it as safetensors)" if others else "")
            )
        variant = "fp16" if "fp16" in variants else min(variants)
    weight_files(folder, variant)
    return variant


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files that hold the weights of `variant`. UsageError where a shard that the index names is missing."""
    middle = f".{variant}" if variant else ""
    index = folder / f"{NAME}.safetensors.index{middle}.json"
    if not index.is_file():
        return [folder / f"{NAME}{middle}.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{outside[0]} is no name of a file beside it")
        files = [folder / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"{index} is no index of weights: {error}") from error
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UsageError(f"{folder} is incomplete: {index.name} names {missing[0]}, which is missing; copy it again")
    return files


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights in `folder` by name, from the headers of its files only.

    Raises UsageError where a file is no safetensors file, or is cut off.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder, find_variant(folder)):
        try:
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} cannot be read: {error}; copy it again") from error
    return shapes


def part_digest(folder: Path) -> str:
    """SHA-256, hexadecimal, over configuration and weights of one part of a model (`vae/`, `learner/`)."""
    return _digest(folder, sorted(folder.glob("[!.]*.safetensors")))


def base_digest(path: Path) -> str:
    """SHA-256, hexadecimal, of the used parts of the base in `path`: `vae/`, `unet/`, the scheduler's configuration.

    Only weights that are loaded count: adding a variant does not change the digest.
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
    """A configuration without the keys that diffusers adds: its version and the path of loading."""
    values = json.loads(config.read_text())
    return json.dumps({k: v for k, v in values.items() if not k.startswith("_")}, sort_keys=True).encode()


@functools.lru_cache(maxsize=64)
def _of_file(path: Path, size: int, modified: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
