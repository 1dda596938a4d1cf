"""Upscaling of pictures from anywhere to anywhere, one by one; a bad one does not stop the others."""

import glob
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from deedsr.errors import DeeDSRError, UsageError
from pipelines.models import load_pipeline, resolve_model
from pipelines.storage import LocalStorage, Storage, open_storage

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jp2", ".avif")


@dataclass
class UpscaleResult:
    """`images`: `{input, output, seconds}`; `failed`: `{input, reason}`."""

    images: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)


class Source(NamedTuple):
    """One picture to enlarge."""

    storage: Storage
    path: str  # in its storage
    target: str  # of its result, in the output's storage

    @property
    def uri(self) -> str:
        return f"{self.storage.uri.rstrip('/')}/{self.path}"


class Decoded(NamedTuple):
    """A picture as the pipeline takes it, and what of it the pipeline does not see."""

    rgb: np.ndarray  # uint8 (H, W, 3), upright
    alpha: Image.Image | None
    grey: bool
    profile: bytes | None  # ICC


def upscale(
    inputs: Sequence[str],
    out: str,
    *,
    model: str = "tiny",
    steps: int | None = None,
    noise_guidance: float | None = None,
    noise_guidance_share: float | None = None,
    eta: float | None = None,
    color_fix: str | None = None,
    solver: str | None = None,
    tile: int | None = None,
    degradation_per_tile: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> UpscaleResult:
    """Enlarge pictures into PNG files in `out`, named like their inputs; the folders below an input folder are kept.

    Args:
        inputs: files, folders (searched through), glob patterns, S3 objects and prefixes.
        out: folder or S3 prefix; what is there under the same name is replaced.
        model: `tiny`, or a model's folder, URI, hub id or `models:/NAME/VERSION`.
        steps, noise_guidance, noise_guidance_share, eta, color_fix, solver, tile, degradation_per_tile: as for
            `DeeDSRPipeline`; None = the model's own.
        seed: of every picture's noise, so that a picture comes out the same alone and among others.
        progress: show a progress bar on stderr.

    Orientation is applied, transparency is enlarged bicubically and kept, grey stays grey, deeper samples become
    8 bit, of several frames the first is taken. A picture that cannot be read, enlarged or written is in `failed`.
    Raises UsageError before any work where an input has no picture, or the model or a setting is wrong.
    """
    from deedsr.sampling.model_folder import ModelFolder

    target = open_storage(out)
    sources = list(_sources(inputs, target))
    sampling = ModelFolder.read(resolve_model(model)).sampling.override(
        num_inference_steps=steps,
        noise_guidance=noise_guidance,
        noise_guidance_share=noise_guidance_share,
        eta=eta,
        color_fix=color_fix,
        solver=solver,
        tile=tile,
        degradation_per_tile=degradation_per_tile,
    )
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)

    result = UpscaleResult()
    taken: dict[str, str] = {}
    for source in tqdm(sources, desc="upscale", unit="picture", disable=not progress):
        begin = time.monotonic()
        try:
            output = target.child(source.target).uri
            if output == source.uri:
                raise DeeDSRError("its result would replace it: choose another --out")
            if source.target in taken:
                raise DeeDSRError(f"its result would replace that of {taken[source.target]}: give it another --out")
            taken[source.target] = source.uri
            picture = decode(_read(source))
            target.write(source.target, encode(_enlarge(pipeline, picture.rgb, seed, sampling.as_dict()), picture))
        except DeeDSRError as error:
            result.failed.append({"input": source.uri, "reason": str(error)})
        else:
            result.images.append({"input": source.uri, "output": output, "seconds": round(time.monotonic() - begin, 3)})
    return result


def _sources(inputs: Sequence[str], out: Storage) -> Iterator[Source]:
    """Every picture of the inputs in their order, each once. Raises UsageError for an input that has none."""
    seen = set()
    for given in inputs:
        found = list(_of_input(given, out))
        if not found:
            raise UsageError(
                f"{given} has no picture to upscale: give files, folders, glob patterns or URIs with "
                f"{', '.join(SUFFIXES)} (what lies in --out is left out)"
            )
        for source in found:
            if source.uri not in seen:
                seen.add(source.uri)
                yield source


def _of_input(given: str, out: Storage) -> Iterator[Source]:
    storage = open_storage(given)
    if isinstance(storage, LocalStorage):
        if storage.directory.is_dir():
            yield from _of_folder(storage, out)
        elif storage.directory.is_file():
            yield _of_file(storage.directory)
        elif glob.has_magic(given):
            matches = map(Path, sorted(glob.glob(str(storage.directory), recursive=True)))
            yield from (_of_file(match) for match in matches if match.is_file() and _is_picture(match.name))
        else:
            raise UsageError(f"{given} does not exist")
        return
    folder, _, name = storage.uri.rpartition("/")
    if folder != "s3:/" and open_storage(folder).exists(name):
        yield Source(open_storage(folder), name, _result_name(name))
    else:
        yield from _of_folder(storage, out)


def _of_folder(storage: Storage, out: Storage) -> Iterator[Source]:
    """The pictures below a folder, without results of an earlier command."""
    for entry in storage.list():
        source = Source(storage, entry.path, _result_name(entry.path))
        if _is_picture(entry.path) and not source.uri.startswith(f"{out.uri.rstrip('/')}/"):
            yield source


def _of_file(path: Path) -> Source:
    return Source(LocalStorage(path.parent), path.name, _result_name(path.name))


def _is_picture(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _result_name(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(".png"))


def _read(source: Source) -> bytes:
    try:
        return source.storage.read(source.path)
    except FileNotFoundError:
        raise DeeDSRError("it is gone") from None


def decode(data: bytes) -> Decoded:
    """A picture file's first frame, upright. Raises DeeDSRError saying what is wrong with it."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise DeeDSRError(f"too large to be decoded: {error}") from error
    except UnidentifiedImageError as error:
        raise DeeDSRError("not a picture of a known format") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise DeeDSRError(f"damaged, it cannot be decoded: {error}") from error
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        grey = image.mode in ("1", "L", "LA")
        image = image.convert("RGBA")
        return Decoded(np.array(image.convert("RGB")), image.getchannel("A"), grey, profile)
    return Decoded(np.array(image.convert("RGB")), None, image.mode in ("1", "L"), profile)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (Pillow keeps some of it in 32) to 8, rounded."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DeeDSRError(f"its samples (Pillow mode {image.mode}) are not of 8 or 16 bits: convert it first")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def _enlarge(pipeline: Any, rgb: np.ndarray, seed: int, sampling: dict[str, Any]) -> Image.Image:
    import torch

    try:
        return pipeline(rgb, generator=torch.Generator().manual_seed(seed), **sampling).images[0]
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _too_large(rgb) from error
    except RuntimeError as error:  # what torch raises when the CPU's memory is short
        if "not enough memory" in str(error) or "allocate memory" in str(error):
            raise _too_large(rgb) from error
        raise


def _too_large(rgb: np.ndarray) -> DeeDSRError:
    return DeeDSRError(f"not enough memory to enlarge {rgb.shape[1]}x{rgb.shape[0]} pixels: cut it into parts")


def encode(enlarged: Image.Image, picture: Decoded) -> bytes:
    """PNG of the enlarged colours with what the original had beside them."""
    if picture.grey:
        enlarged = enlarged.convert("L").convert("RGB")
    if picture.alpha is not None:
        enlarged.putalpha(picture.alpha.resize(enlarged.size, Image.Resampling.BICUBIC))
    file = io.BytesIO()
    enlarged.save(file, "PNG", icc_profile=picture.profile)
    return file.getvalue()
