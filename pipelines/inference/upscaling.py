"""Upscaling of pictures from anywhere to anywhere, here or on a cluster; a bad one does not stop the others."""

import posixpath
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from tqdm import tqdm

from deedsr.errors import UsageError
from pipelines import cluster
from pipelines.distribution import each, network_plan
from pipelines.inference.options import UpscaleOptions
from pipelines.inference.pictures import EXTENSIONS, Format
from pipelines.inference.upscaler import Failed, Input, Resize, Upscaled, Upscaler
from pipelines.models import Model
from pipelines.placement import place_networks
from pipelines.storage import Storage, is_hidden, leads_out, object_at, open_storage, waiting
from pipelines.storage.local import begun_name
from pipelines.storage.location import matching, split_pattern
from pipelines.storage.lock import PARTIAL


@dataclass
class UpscaleResult:
    """`reused`: how many of the results were there."""

    images: list[Upscaled]
    failed: list[Failed]
    reused: int


def upscale(options: UpscaleOptions, progress: bool = True) -> UpscaleResult:
    """Enlarge pictures into files in `out`, named like their inputs; the folders below an input folder are kept.

    Without `overwrite` a result of the same picture, model and settings is reused, another result of this command is
    replaced, and a picture whose place is taken by anything else is in `failed`; with it, whatever lies in the place is
    replaced, inputs excepted. A picture that comes out black or not finite in half precision is made again in fp32. The
    noise follows from the seed alone, so that a picture comes out the same alone and among others. `progress`: show a
    bar on stderr.

    A picture that cannot be read, enlarged or written is in `failed`. Raises UsageError before any work where an input
    has no picture, or the model, a setting or `out` is wrong.
    """
    if options.workers is not None and not options.ray:
        raise UsageError(f"--workers {options.workers} is for --ray: give both, or neither")
    if not 1 <= options.quality <= 100:
        raise UsageError(f"--quality must be 1 to 100, got {options.quality}")
    target = open_storage(options.out)
    pictures = find_inputs(options.input, target, options.format)
    found = Model.find(options.model, options.base)
    resize = None if options.factor == found.description.scale else resized(options.factor, options.size)
    settings = found.description.sampling.chosen(**options.sampling())
    work = Upscaler(options, options.device, found, settings, target, resize)
    if not options.ray:
        place_networks(cluster.this_machine(), options.device, 1, "upscale")
    _ = found.digest  # an error of the model or its base is one of the command, not of every picture
    target.require_writable()

    outcomes: dict[str, Upscaled | Failed] = {**conflicts(pictures, target)}
    given = [picture for picture in pictures if picture.uri not in outcomes]
    with tqdm(total=len(given), desc="upscale", unit="picture", disable=not progress) as bar:
        for done in _on_cluster(work, given) if options.ray else map(work, given):
            outcomes[done["input"]] = done
            bar.update()
    ordered = [outcomes[picture.uri] for picture in pictures]
    images = [done for done in ordered if "reason" not in done]
    failed = [done for done in ordered if "reason" in done]
    return UpscaleResult(images, failed, reused=sum(image["reused"] for image in images))


def resized(factor: float | None, size: str | None) -> Resize | None:
    """What `--factor` and `--size` ask for. Raises UsageError for both, and for a size that is none."""
    if factor is not None and size is not None:
        raise UsageError("--factor and --size: give one of them")
    if factor is not None and factor < 1:
        raise UsageError(f"--factor must be 1 or more, got {factor:g}")
    if size is None:
        return Resize(factor) if factor is not None else None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if match is None:
        raise UsageError(f"--size must be WIDTHxHEIGHT in pixels, such as 2048x1536, got {size}")
    return Resize(box=(int(match[1]), int(match[2])))


def _on_cluster(work: Upscaler, pictures: list[Input]) -> Iterator[Upscaled | Failed]:
    """`work` on each of the pictures in actors, in any order."""
    if not pictures:
        return
    plan = network_plan("upscale", work.device, work.options.workers, len(pictures))
    sentinel = f".{uuid.uuid4().hex}{PARTIAL}"  # which no listing shows
    local = work.out.local_path("") is not None
    try:
        if local:
            work.out.write(sentinel, b"")
        yield from each(replace(work, device=plan.device, sentinel=sentinel), pictures, plan, "upscale")
    finally:
        if local:
            work.out.delete(sentinel)
        _remove_parts(work.out, {picture.target for picture in pictures})


def _remove_parts(out: Storage, targets: set[str]) -> None:
    """Removes what killed workers had begun to write; on S3 nothing is seen of it."""
    if out.local_path("") is None:
        return
    begun = {posixpath.join(posixpath.dirname(path), begun_name(posixpath.basename(path))) for path in targets}
    with waiting.cleaning(f"what killed workers began in {out.uri}"):
        for upload in out.abandoned_uploads(timedelta(0)):
            if upload.path in begun:
                out.abort(upload)


SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff"),
    *(".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)


def find_inputs(inputs: Sequence[str], out: Storage, format: Format) -> list[Input]:
    """Every picture of the inputs in their order, each once. Raises UsageError for an input that has none."""
    found: dict[str, Input] = {}
    for given in inputs:
        places = list(_places(given, out))
        if not places:
            raise UsageError(
                f"{given} has no picture to upscale: give files, folders, glob patterns or URIs with "
                f"{', '.join(SUFFIXES)} (what lies in --out is left out)"
            )
        for storage, path, kept in places:
            picture = Input(storage, path, _result_name(kept, format))
            found.setdefault(picture.uri, picture)
    return list(found.values())


def conflicts(pictures: Sequence[Input], out: Storage) -> dict[str, Failed]:
    """Which pictures must not be enlarged, by URI, and why: their results would replace an input or one another, or lie
    outside of `out`."""
    inputs = {_identity(picture.storage, picture.path): picture.uri for picture in pictures}
    taken: dict[str, str] = {}
    found = {}
    for picture in pictures:
        replaced = None if leads_out(picture.target) else inputs.get(_identity(out, picture.target))
        if leads_out(picture.target):
            reason = f"its name {picture.path} leads out of --out: give it another, or name it alone"
        elif replaced == picture.uri:
            reason = "its result would replace it: choose another --out"
        elif replaced is not None:
            reason = f"its result would replace the input {replaced}: choose another --out"
        elif picture.target in taken:
            reason = f"its result would replace that of {taken[picture.target]}: give it another --out"
        else:
            taken[picture.target] = picture.uri
            continue
        found[picture.uri] = Failed(input=picture.uri, reason=reason)
    return found


def _identity(storage: Storage, path: str) -> str | tuple[int, int]:
    """Equal for two names of one local file (links, letter case), else the URI."""
    local = storage.local_path(path)
    if local is not None:
        try:
            status = local.stat()
        except OSError:
            pass
        else:
            return status.st_dev, status.st_ino
    return _uri(storage, path)


def _places(given: str, out: Storage) -> Iterator[tuple[Storage, str, str]]:
    """(storage, path in it, the path that its result keeps) of an input's pictures.

    What lies in `out` are results of earlier commands: a folder or pattern leaves them out, a file's own name does not.
    """
    uri = open_storage(given).uri
    folder, pattern = split_pattern(uri)
    if not pattern and _is_file(uri):
        storage, path = object_at(uri)
        yield storage, path, posixpath.basename(path)
        return
    storage = open_storage(folder if pattern else uri)
    for entry in matching(storage, pattern) if pattern else storage.list():
        path = entry.path
        if not _is_picture(path) or _uri(storage, path).startswith(f"{out.uri.rstrip('/')}/"):
            continue
        if pattern:
            yield storage, path, posixpath.basename(path)
        elif not is_hidden(path):
            yield storage, path, "/".join(part for part in path.split("/") if part not in ("", "."))


def _is_file(uri: str) -> bool:
    local = open_storage(uri).local_path("")
    if local is None:
        bucket, key = object_at(uri)
        return bool(key) and bucket.exists(key)
    if not local.exists():
        raise UsageError(f"{uri} does not exist")
    return not local.is_dir()


def _is_picture(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _result_name(path: str, format: Format) -> str:
    """`path` with the extension of the format of its result."""
    stem, _, extension = path.rpartition(".")
    if not _is_picture(path):  # a file that was named, with no extension or an unknown one
        stem, extension = path, ""
    own = EXTENSIONS.get(extension.lower())
    wanted = (own or "png") if format == "same" else format
    return path if own == wanted else f"{stem}.{'jpg' if wanted == 'jpeg' else wanted}"  # a.JPG stays a.JPG


def _uri(storage: Storage, path: str) -> str:
    return f"{storage.uri.rstrip('/')}/{path}"
