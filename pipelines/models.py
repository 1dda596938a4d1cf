"""Models, bases and learners by name, folder, hub id, URI or MLflow version: where they are on this machine."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deedsr.errors import DeeDSRError, UsageError
from pipelines.machine import this_machine
from pipelines.storage import localize, open_storage, publish
from pipelines.storage.lock import scratch_folder

if TYPE_CHECKING:
    import torch

    from deedsr.hub.model_folder import ModelFolder
    from deedsr.sampling.pipeline import DeeDSRPipeline

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def _local(name: str | Path) -> Path | str:
    """A URI becomes a local folder; whatever else stays."""
    if str(name).startswith("models:"):
        return _registered(str(name))
    return localize(name, _is_of_model) if "://" in str(name) else name


def _is_of_model(path: str) -> bool:
    """Whether an object belongs to a model or base, and not to the training that wrote it or to unused parts."""
    from deedsr.hub.model_folder import PARTS
    from deedsr.hub.weights import NAME

    folder, _, file = path.rpartition("/")
    is_weights = file.startswith(NAME) and file.endswith(".safetensors")
    return folder in ("", *PARTS) and (is_weights or file.endswith((".json", ".md")) or file.startswith("LICENSE"))


def _registered(name: str) -> Path:
    """Local folder of a version in MLflow's registry, with the weights that were registered."""
    from pipelines.tracking import registry

    version = registry.find(name)
    folder = localize(version.source, _is_of_model) if _is_place(version.source) else registry.fetch(version)
    if version.weights is not None and registry.weights_digest(open_storage(str(folder))) != version.weights:
        raise UsageError(
            f"the weights of {version.uri} are gone: a later training wrote others to {version.source}. "
            f"Take a newer version, or the folder as it is"
        )
    return folder


def _is_place(source: str) -> bool:
    """Whether a version refers to storage that is read without MLflow."""
    return source.startswith(("s3://", "file://", "/"))


def pinned(name: str) -> str:
    """What a model, learner or base means where the command is given, for workers, whose working directory is another
    one, and for continuations: the absolute path of a local folder; the location, or else the fixed version, of
    `models:/...`. Any other name comes back as it is.

    Raises UsageError where the registry has no such model.
    """
    if not name.startswith("models:"):
        local = Path(os.path.expanduser(name))
        return os.path.abspath(local) if name != "tiny" and "://" not in name and local.exists() else name
    from pipelines.tracking import registry

    version = registry.find(name)
    return version.source if _is_place(version.source) else version.uri


@contextmanager
def on_a_worker() -> Iterator[None]:
    """Says on which machine a model is missing that was found where the command was given, and where it must lie."""
    try:
        yield
    except UsageError as error:
        raise UsageError(
            f"on {socket.gethostname()}: {error}. Workers read models by themselves: give a folder that all machines "
            "share, an s3:// location or a hub id"
        ) from error


def resolve_model(model: str | Path) -> Path:
    """Local folder of a model: `tiny`, a folder, a URI, a hub id, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Raises UsageError where there is none.
    """
    from deedsr.hub.model_folder import find_folder

    return find_folder(_local(model))


def resolve_base(base: str | Path) -> Path:
    """Local folder with the `vae/`, `unet/` and `scheduler/` of a base; a model stands for its base.

    Raises UsageError where there is none.
    """
    from deedsr.hub.model_folder import find_base

    return find_base(_local(base))


def resolve_learner(learner: str | Path) -> Path:
    """Local folder to load a degradation learner from, given what `train learner` wrote, a model, or that folder.

    Raises UsageError where there is none.
    """
    from deedsr.hub.model_folder import find_folder

    folder = find_folder(_local(learner))
    if (folder / "learner" / "config.json").is_file():
        return folder / "learner"
    if (folder / "config.json").is_file():
        return folder
    raise UsageError(f"{learner} holds no degradation learner: give the --out of a finished `deedsr train learner`")


def load_vae(base: str | Path, **options: Any) -> Any:
    """The autoencoder of a base; `options` as for diffusers' `from_pretrained` (`torch_dtype`)."""
    from deedsr.hub.model_folder import load_part

    return load_part(resolve_base(base), "vae", **options)


def base_of(model: "ModelFolder", base: str | None = None) -> Path:
    """Local folder of a model's base: `base`, else the one that it names. Raises UsageError where it is another."""
    name = base or model.base
    # The package itself knows no object storage: a base there is fetched here.
    return model.base_path(_local(name) if name and "://" in name else base)


def load_pipeline(
    model: str,
    device: str = "auto",
    digest: str | None = None,
    base: str | None = None,
    precision: Precision = "fp32",
) -> "DeeDSRPipeline":
    """The pipeline of a model by name, folder, URI or hub id, on `device` (see `usable_device`), without progress bar.

    `precision`: that VAE, UNet and adapter compute in; `auto` = fp16 on a CUDA GPU, where it is nearer to fp32 than
    bf16 and as fast, else fp32. `base`: where its base lies, if not where the model says. Raises UsageError where the
    model or its base is missing, incomplete, or the base another than it was trained on; DeeDSRError where it is not
    the one of `digest` (see `model_digest`).
    """
    from deedsr.hub.model_folder import ModelFolder
    from deedsr.sampling.pipeline import DeeDSRPipeline

    place = usable_device(device)
    with on_a_worker() if digest else nullcontext():
        if digest is not None and model_digest(model, base) != digest:
            raise DeeDSRError(f"the model {model} is another one here than when the command was given")
        folder = resolve_model(model)
        pipeline = DeeDSRPipeline.from_pretrained(
            folder, base=base_of(ModelFolder.read(folder), base), torch_dtype=_dtype(precision, place)
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if place.type == "cpu" else pipeline.to(place)


def _dtype(precision: Precision, device: "torch.device") -> "torch.dtype":
    import torch

    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def export_pipeline(model: str, out: str, base: str | None = None, *, half: bool = False) -> dict[str, Any]:
    """Writes model and base into the empty place `out`, as a pipeline that needs nothing else.

    Returns `model` (its location), `bytes`, and `base`, the one that it was made with. Raises UsageError where `out`
    holds something, or as `load_pipeline` does.
    """
    import torch

    target = open_storage(out)
    if next(iter(target.list()), None) is not None:
        raise UsageError(f"--out {target.uri} holds something already: choose an empty place")
    target.require_writable()
    pipeline = load_pipeline(model, "cpu", base=base)
    if half:
        for network in (pipeline.vae, pipeline.unet, pipeline.adapter):
            network.to(torch.float16)  # the learner's running statistics are not for half precision
    with scratch_folder() as folder:
        pipeline.save_pretrained(folder)
        publish(folder, target.uri)
    size = sum(entry.size for entry in target.list())
    return {"model": target.uri, "bytes": size, "base": pipeline.config["lineage"].get("base")}


def usable_device(name: str) -> "torch.device":
    """The device `cpu`, `cuda` or `mps`; `auto` = the CUDA GPU that torch can use here, else the CPU.

    On the CPU torch's threads are kept to the CPUs that this process may use. Raises DeeDSRError where torch cannot use
    what `cuda` or `mps` promises.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise DeeDSRError(
            f"torch {torch.__version__} ({built}) can use no GPU on {socket.gethostname()}: check the driver there "
            "(nvidia-smi) and its torch, or compute on the CPU instead"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeeDSRError(
            f"torch {torch.__version__} has no MPS on {socket.gethostname()}: it is for Macs with Apple's GPU"
        )
    if name == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), this_machine().cpus))
    return torch.device(name)


def training_run(model: str | Path) -> str | None:
    """MLflow run that trained a model or learner, where its folder says so."""
    from deedsr.hub.model_folder import find_folder

    record = find_folder(_local(model)) / "training.json"
    return json.loads(record.read_bytes()).get("run_id") if record.is_file() else None


def model_digest(model: str, base: str | None = None) -> str:
    """SHA-256 over everything of a model that a result depends on: networks, scheduler, scale."""
    from deedsr.hub.digests import part_digest
    from deedsr.hub.model_folder import ModelFolder

    description = ModelFolder.read(resolve_model(model))
    folder = base_of(description, base)
    digest = hashlib.sha256(f"scale {description.scale}".encode())
    for part in (folder / "vae", folder / "unet", description.path / "learner", description.path / "adapter"):
        digest.update(part_digest(part).encode())
    digest.update((folder / "scheduler" / "scheduler_config.json").read_bytes())
    return digest.hexdigest()
