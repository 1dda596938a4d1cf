"""Models, bases and learners by name, folder, hub id, URI or MLflow version: where they are on this machine."""

import hashlib
import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deedsr.errors import DeeDSRError, UsageError
from pipelines.machine import this_machine
from pipelines.storage import localize, open_storage

if TYPE_CHECKING:
    import torch

    from deedsr.sampling.pipeline import DeeDSRPipeline


def _local(name: str | Path) -> Path | str:
    """A URI becomes a local folder, without the checkpoints of the training that wrote it; whatever else stays."""
    if str(name).startswith("models:"):
        return _registered(str(name))
    return localize(name, without="checkpoints") if "://" in str(name) else name


def _registered(name: str) -> Path:
    """Local folder of a version in MLflow's registry, with the weights that were registered."""
    from pipelines.tracking import registry

    version = registry.find(name)
    folder = localize(version.source, without="checkpoints") if _is_place(version.source) else registry.fetch(version)
    if version.weights is not None and registry.weights_digest(open_storage(str(folder))) != version.weights:
        raise UsageError(
            f"the weights of {version.uri} are gone: a later training wrote others to {version.source}. "
            f"Take a newer version, or the folder as it is"
        )
    return folder


def _is_place(source: str) -> bool:
    """Whether a version refers to storage that is read without MLflow."""
    return source.startswith(("s3://", "file://", "/"))


def pinned(model: str) -> str:
    """What `models:/...` means today, for workers and continuations: a location, or else a fixed version.

    Raises UsageError where there is none. Any other name comes back as it is.
    """
    if not model.startswith("models:"):
        return model
    from pipelines.tracking import registry

    version = registry.find(model)
    return version.source if _is_place(version.source) else version.uri


def resolve_model(model: str | Path) -> Path:
    """Local folder of a model: `tiny`, a folder, a URI, a hub id, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Raises UsageError where there is none.
    """
    from deedsr.sampling.model_folder import find_folder

    return find_folder(_local(model))


def resolve_base(base: str | Path) -> Path:
    """Local folder with the `vae/`, `unet/` and `scheduler/` of a base; a model stands for its base.

    Raises UsageError where there is none.
    """
    from deedsr.sampling.model_folder import find_base

    return find_base(_local(base))


def resolve_learner(learner: str | Path) -> Path:
    """Local folder to load a degradation learner from, given what `train learner` wrote, a model, or that folder.

    Raises UsageError where there is none.
    """
    from deedsr.sampling.model_folder import find_folder

    folder = find_folder(_local(learner))
    if (folder / "learner" / "config.json").is_file():
        return folder / "learner"
    if (folder / "config.json").is_file():
        return folder
    raise UsageError(f"{learner} holds no degradation learner: give the --out of a finished `deedsr train learner`")


def load_vae(base: str | Path, **options: Any) -> Any:
    """The autoencoder of a base; `options` as for diffusers' `from_pretrained` (`torch_dtype`)."""
    from deedsr.sampling.model_folder import load_part

    return load_part(resolve_base(base), "vae", **options)


def load_pipeline(model: str, device: str = "auto", digest: str | None = None) -> "DeeDSRPipeline":
    """The pipeline of a model by name, folder, URI or hub id, on `device` (see `usable_device`), without progress bar.

    Raises UsageError where the model or its base is missing or incomplete, DeeDSRError where it is not the one of
    `digest` (see `model_digest`).
    """
    from deedsr.sampling.model_folder import ModelFolder
    from deedsr.sampling.pipeline import DeeDSRPipeline

    if digest is not None and model_digest(model) != digest:
        raise DeeDSRError(f"the model {model} is another one here than when the command was given")
    folder = resolve_model(model)
    base = ModelFolder.read(folder).base
    # The package itself knows no object storage: a base there is fetched here.
    pipeline = DeeDSRPipeline.from_pretrained(folder, base=_local(base) if base and "://" in base else None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(usable_device(device))


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
    from deedsr.sampling.model_folder import find_folder

    record = find_folder(_local(model)) / "training.json"
    return json.loads(record.read_bytes()).get("run_id") if record.is_file() else None


def part_digest(folder: Path) -> str:
    """SHA-256, hexadecimal, over configuration and weights of one part of a model (`vae/`, `learner/`)."""
    config = json.loads((folder / "config.json").read_bytes())
    digest = hashlib.sha256()
    # Without diffusers' own notes: which version wrote it, and where it was loaded from.
    digest.update(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True).encode())
    for path in sorted(folder.glob("[!.]*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def model_digest(model: str) -> str:
    """SHA-256 over everything of a model that a result depends on: networks, scheduler, scale."""
    from deedsr.sampling.model_folder import ModelFolder

    description = ModelFolder.read(resolve_model(model))
    name = description.base
    base = resolve_base(name) if name and "://" in name else description.base_path()
    digest = hashlib.sha256(f"scale {description.scale}".encode())
    for folder in (base / "vae", base / "unet", description.path / "learner", description.path / "adapter"):
        digest.update(part_digest(folder).encode())
    digest.update((base / "scheduler" / "scheduler_config.json").read_bytes())
    return digest.hexdigest()
