"""Models, bases and learners by name, folder, hub id or URI: where they are on this machine."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deedsr.errors import UsageError
from pipelines.storage import localize

if TYPE_CHECKING:
    from deedsr.sampling.pipeline import DeeDSRPipeline


def _local(name: str | Path) -> Path | str:
    """A URI becomes a local folder, without the checkpoints of the training that wrote it; whatever else stays."""
    return localize(name, without="checkpoints") if "://" in str(name) else name


def resolve_model(model: str | Path) -> Path:
    """Local folder of a model: `tiny`, a folder, a URI or a hub id. Raises UsageError where there is none."""
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


def load_pipeline(model: str | Path) -> "DeeDSRPipeline":
    """The pipeline of a model by name, folder, URI or hub id, on this machine's GPU if it has one.

    Raises UsageError where the model or its base is missing or incomplete.
    """
    import torch

    from deedsr.sampling.model_folder import ModelFolder
    from deedsr.sampling.pipeline import DeeDSRPipeline

    folder = resolve_model(model)
    base = ModelFolder.read(folder).base
    # The package itself knows no object storage: a base there is fetched here.
    pipeline = DeeDSRPipeline.from_pretrained(folder, base=_local(base) if base and "://" in base else None)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def training_run(model: str | Path) -> str | None:
    """MLflow run that trained the model, where its folder says so."""
    record = resolve_model(model) / "training.json"
    return json.loads(record.read_text()).get("run_id") if record.is_file() else None


def part_digest(folder: Path) -> str:
    """SHA-256, hexadecimal, over configuration and weights of one part of a model (`vae/`, `learner/`)."""
    config = json.loads((folder / "config.json").read_text())
    digest = hashlib.sha256()
    # Without diffusers' own notes: which version wrote it, and where it was loaded from.
    digest.update(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
