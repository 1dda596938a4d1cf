"""Models, bases and learners by name, folder, hub id, URI or MLflow version.

A name is looked up once, where the command is given. The reference that `find` returns is passed on, to workers too.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from deedsr.errors import DeeDSRError, UsageError
from deedsr.hub.model_folder import PARTS, ModelFolder, find_base, find_folder, with_revision
from deedsr.hub.weights import NAME, base_digest, part_digest
from pipelines.machine import this_machine
from pipelines.storage import localize, open_storage, publish
from pipelines.storage.lock import scratch_folder

if TYPE_CHECKING:
    import torch

    from deedsr.sampling.pipeline import DeeDSRPipeline

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Reference:
    """A model, base or learner that was found by its name.

    Pickled, it is the name alone. The process that unpickles it looks the folder up on its own machine at first use.

    Attributes:
        name: means the same on every machine and in later commands: `tiny`, an absolute path, a URI, a hub id with its
            revision, or a fixed version of MLflow's registry.
    """

    def __init__(self, name: str, folder: Path | None = None):
        """`folder`: what the name means on this machine; None = a worker's, looked up at first use."""
        self.name, self._folder = name, folder

    @classmethod
    def find(cls, name: str | Path) -> Self:
        """Look the name up. Raises UsageError if nothing is found."""
        reference = cls(*_find(str(name)))
        _ = reference.path
        return reference

    @cached_property
    def path(self) -> Path:
        """Local folder of what is used. Raises UsageError where it is missing."""
        if self._folder is not None:
            return self._used(self._folder)
        with _on_a_worker():
            return self._used(_find(self.name)[1])

    def _used(self, folder: Path) -> Path:
        """The folder inside of what was found that this kind of reference is for."""
        return folder

    @property
    def run_id(self) -> str | None:
        """MLflow run that trained it, where its folder records it."""
        record = (self._folder or _find(self.name)[1]) / "training.json"
        return json.loads(record.read_bytes()).get("run_id") if record.is_file() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name,)


class Base(Reference):
    """A base: `path` holds its `vae/`, `unet/` and `scheduler/`. The name of a trained model means its base."""

    def _used(self, folder: Path) -> Path:
        return find_base(folder)

    @cached_property
    def digest(self) -> str:
        """See `deedsr.hub.weights.base_digest`."""
        return base_digest(self.path)


class Learner(Reference):
    """A degradation learner: what `train learner` wrote, a model, or the folder `learner/` of either: `path`."""

    def _used(self, folder: Path) -> Path:
        for path in (folder / "learner", folder):
            if (path / "config.json").is_file():
                return path
        raise UsageError(
            f"{self.name} holds no degradation learner: give the --out of a finished `deedsr train learner`"
        )

    @cached_property
    def digest(self) -> str:
        """See `deedsr.hub.weights.part_digest`."""
        return part_digest(self.path)


class Adapter(Reference):
    """The adapter of a model; `path` is its folder."""

    def _used(self, folder: Path) -> Path:
        return folder / "adapter"


class Model(Reference):
    """A DeeDSR model. `path` is its folder, `base` is set where the command gave another base than the model names.

    A worker that unpickles it refuses to load another model than the command was given.
    """

    def __init__(self, name: str, folder: Path | None = None, base: Base | None = None, expected: str | None = None):
        super().__init__(name, folder)
        self.base, self._expected = base, expected

    @classmethod
    def find(cls, name: str | Path, base: str | Path | None = None) -> Self:
        """Raises UsageError where there is no such folder. `base`: name of its base, None = the one the model names."""
        return cls(*_find(str(name)), Base.find(base) if base else None)

    @cached_property
    def description(self) -> ModelFolder:
        """Raises UsageError where the folder holds no DeeDSR model."""
        return ModelFolder.read(self.path)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything of a model that a result depends on: networks, scheduler, scale, gate."""
        model, base = self.description, self._base_path
        digest = hashlib.sha256(f"scale {model.scale}".encode())
        for part in (base / "vae", base / "unet", self.path / "learner", self.path / "adapter"):
            digest.update(part_digest(part).encode())
        digest.update((base / "scheduler" / "scheduler_config.json").read_bytes())
        if model.gate:
            digest.update(json.dumps(model.gate, sort_keys=True).encode())
        return digest.hexdigest()

    @cached_property
    def _base_path(self) -> Path:
        return self.description.base_path(self._given_base)

    @cached_property
    def _given_base(self) -> Path | None:
        """Local folder of a base that is given, or that the model names by a URI, which `deedsr` itself cannot read."""
        if self.base is not None:
            return self.base.path
        named = self.description.base
        return Base.find(named).path if named and "://" in named else None

    def load(self, device: str = "auto", precision: Precision = "fp32") -> "DeeDSRPipeline":
        """The pipeline on `device` (see `usable_device`), without progress bar.

        `precision`: that VAE, UNet and adapter compute in; `auto` = fp16 on a CUDA GPU, where it is nearer to fp32 than
        bf16 and as fast, else fp32, which is without TF32. Raises UsageError where the model or its base is missing,
        incomplete, or the base another than it was trained on; DeeDSRError where a worker finds another model than the
        command was given.
        """
        import torch

        from deedsr.precision import set_tf32
        from deedsr.sampling.pipeline import DeeDSRPipeline

        set_tf32(False)
        place, path, base = usable_device(device), self.path, self._given_base
        if precision == "auto":
            precision = "fp16" if place.type == "cuda" else "fp32"
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        with _on_a_worker() if self._expected else nullcontext():
            if self._expected not in (None, self.digest):
                raise DeeDSRError(f"the model {self.name} is another one here than when the command was given")
            pipeline = DeeDSRPipeline.from_pretrained(path, base=base, torch_dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline if place.type == "cpu" else pipeline.to(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, None, self.base, self.digest)


@contextmanager
def _on_a_worker() -> Iterator[None]:
    """Adds to an error which machine a model is missing on that was found where the command was given."""
    try:
        yield
    except UsageError as error:
        raise UsageError(
            f"on {socket.gethostname()}: {error}. Workers read models by themselves: give a folder that all machines "
            "share, an s3:// location or a hub id"
        ) from error


def _find(name: str) -> tuple[str, Path]:
    """The name that means the same on every machine, and the local folder that it means on this one."""
    if name.startswith("models:"):
        return _registered(name)
    if "://" in name:
        return name, find_folder(localize(name, _is_of_model))
    folder = find_folder(name)
    local = name != "tiny" and Path(os.path.expanduser(name)).is_dir()
    return os.path.abspath(folder) if local else with_revision(name, folder), folder


def _registered(name: str) -> tuple[str, Path]:
    """A version in MLflow's registry, with the weights that were registered: its location where that can be read
    without MLflow, else its fixed version."""
    from pipelines.tracking import registry

    version = registry.find(name)
    is_place = version.source.startswith(("s3://", "file://", "/"))
    folder = localize(version.source, _is_of_model) if is_place else registry.fetch(version)
    if version.weights is not None and registry.weights_digest(open_storage(str(folder))) != version.weights:
        raise UsageError(
            f"the weights of {version.uri} are gone: a later training wrote others to {version.source}. "
            f"Take a newer version, or the folder as it is"
        )
    return version.source if is_place else version.uri, folder


def _is_of_model(path: str) -> bool:
    """Whether an object belongs to a model or base, and not to the training that wrote it or to unused parts."""
    folder, _, file = path.rpartition("/")
    is_weights = file.startswith(NAME) and file.endswith(".safetensors")
    return folder in ("", *PARTS) and (is_weights or file.endswith((".json", ".md")) or file.startswith("LICENSE"))


def export_pipeline(model: Model, out: str, *, half: bool = False) -> dict[str, Any]:
    """Writes a model and its base into the empty place `out`, as one self-contained pipeline.

    Returns `model` (its location), `bytes`, and `base`, the one that it was made with. Raises UsageError where `out`
    holds something, or as `Model.load` does.
    """
    import torch

    target = open_storage(out)
    if next(iter(target.list()), None) is not None:
        raise UsageError(f"--out {target.uri} holds something already: choose an empty place")
    target.require_writable()
    pipeline = model.load("cpu")
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
