"""The command: finds the pictures, has each one enlarged, and says what came of it."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from deedsr.errors import UsageError
from pipelines import cluster
from pipelines.distribution import place, spread
from pipelines.inference.encoding import Format
from pipelines.inference.inputs import Source, conflicts, find_sources
from pipelines.inference.upscaler import Done, Upscaler
from pipelines.models import Precision, model_digest, pinned, resolve_model
from pipelines.placement import Device, place_networks
from pipelines.storage import Storage, open_storage, waiting
from pipelines.storage.local import begun_name

__all__ = ["UpscaleResult", "upscale"]


@dataclass
class UpscaleResult:
    """`images`: `{input, output, seconds, reused}`; `failed`: `{input, reason}`; `reused`: how many were there."""

    images: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    reused: int = 0


def upscale(
    inputs: Sequence[str],
    out: str,
    *,
    model: str = "tiny",
    base: str | None = None,
    format: Format = "png",
    quality: int = 95,
    overwrite: bool = False,
    ray: bool = False,
    workers: int | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: int = 0,
    progress: bool = True,
    steps: int | None = None,
    **sampling: Any,
) -> UpscaleResult:
    """Enlarge pictures into files in `out`, named like their inputs; the folders below an input folder are kept.

    Args:
        inputs: files, folders (searched through), glob patterns, S3 objects, prefixes and patterns.
        out: folder or S3 prefix.
        model: `tiny`, or a model's folder, URI, hub id or `models:/NAME/VERSION`.
        base: where the model's base lies: folder, URI or hub id; None = where the model says.
        format: of the results; `same` = the input's own if that is PNG, JPEG or WebP, else PNG.
        quality: of JPEG and WebP, 1 to 100.
        overwrite: make every result anew and replace whatever lies in its place, inputs excepted. Otherwise a result
            of the same picture, model and settings is reused, another result of this command is replaced, and a
            picture whose place is taken by anything else is in `failed`.
        ray: spread the pictures over the cluster that `RAY_ADDRESS` names, else over this machine.
        workers: with `ray`, pictures at a time; None = one on every GPU, or every CPU where the device is the CPU.
        device: `auto` = a CUDA GPU where this machine has one, and on a cluster always; `cpu`; `cuda`; `mps`.
        precision: that the networks compute in, `fp32`, `bf16` or `fp16`; `auto` = fp16 on a CUDA GPU, else fp32. A
            picture that comes out black or not finite in half precision is made again in fp32.
        seed: of every picture's noise, so that a picture comes out the same alone and among others.
        progress: show a progress bar on stderr.
        steps: sampling steps.
        sampling: other settings of `SamplingSettings`; what is None or missing is the model's own.

    A picture that cannot be read, enlarged or written is in `failed`. Raises UsageError before any work where an input
    has no picture, or the model, a setting or `out` is wrong.
    """
    from deedsr.hub.model_folder import ModelFolder

    if workers is not None and not ray:
        raise UsageError(f"--workers {workers} is for --ray: give both, or neither")
    if not 1 <= quality <= 100:
        raise UsageError(f"--quality must be 1 to 100, got {quality}")
    target = open_storage(out)
    sources = find_sources(inputs, target, format)
    model, base = pinned(model), pinned(base) if base else None
    settings = ModelFolder.read(resolve_model(model)).sampling.chosen(num_inference_steps=steps, **sampling)
    if not ray:
        place_networks(cluster.this_machine(), device, 1, "upscale")
    digest = model_digest(model, base)
    work = Upscaler(model, digest, settings, seed, quality, overwrite, target, base, device, precision)
    target.require_writable()

    reasons = conflicts(sources, target)
    given = [source for source in sources if source.uri not in reasons]
    outcomes = {}
    with tqdm(total=len(given), desc="upscale", unit="picture", disable=not progress) as bar:
        for done in _spread(work, given, workers) if ray else map(work, given):
            outcomes[done.input] = done
            bar.update()

    result = UpscaleResult()
    for source in sources:
        reason = reasons.get(source.uri) or outcomes[source.uri].reason
        if reason:
            result.failed.append({"input": source.uri, "reason": reason})
            continue
        image = outcomes[source.uri]._asdict()
        del image["reason"]
        result.images.append(image)
        result.reused += image["reused"]
    return result


def _spread(work: Upscaler, sources: list[Source], workers: int | None) -> Iterator[Done]:
    """`work` on each of the sources in actors, in any order."""
    if not sources:
        return
    plan = place("upscale", len(sources), work.device, workers)
    try:
        yield from spread(replace(work, device=plan.device), sources, plan, "upscale")
    finally:
        _remove_parts(work.out, {source.target for source in sources})


def _remove_parts(out: Storage, targets: set[str]) -> None:
    """Removes what killed workers had begun to write; on S3 nothing is seen of it."""
    if out.local_path("") is None:
        return
    begun = {posixpath.join(posixpath.dirname(path), begun_name(posixpath.basename(path))) for path in targets}
    with waiting.cleaning(f"what killed workers began in {out.uri}"):
        for upload in out.abandoned_uploads(timedelta(0)):
            if upload.path in begun:
                out.abort(upload)
