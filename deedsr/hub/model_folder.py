"""Model folders and bases on disk: location, description and parts.

A model is a full pipeline (`model_index.json`) or what training writes: `adapter/`, `learner/` and `deedsr.json`,
which names the base. A base is any folder with `vae/`, `unet/` and `scheduler/`; a full pipeline is also a base.
Weights are read from safetensors only.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from deedsr.errors import UsageError
from deedsr.hub.settings import SamplingSettings
from deedsr.hub.weights import NAME, base_digest, find_variant

FORMAT_VERSION = 1
BASE_PARTS = ("vae", "unet", "scheduler")
TRAINED_PARTS = ("learner", "adapter")
PARTS = BASE_PARTS + TRAINED_PARTS
# Files downloaded from a hub repository: configurations and one set of weights of each part that is used. No text
# encoder, no other formats, no pickles.
HUB_FILES = [
    *("model_index.json", "deedsr.json", "training.json", "README.md", "LICENSE*"),
    *(f"{part}/{name}" for part in PARTS for name in ("*.json", f"{NAME}.safetensors", f"{NAME}-*-of-*.safetensors")),
]
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")  # and a revision


@dataclass(frozen=True)
class ModelFolder:
    """A model's description.

    Attributes:
        path: holds `learner/` and `adapter/`, and `vae/`, `unet/` and `scheduler/` where `base` is None.
        base: name, folder, URI or hub id of the base, as written.
        scale: enlargement factor.
        base_digest: of the base that the model was trained on (`weights.base_digest`); None where it is not recorded.
        sampling: recommended settings.
        gate: configuration of the model's `RestorationGate`, None where it has none.
        lineage: `license`, `base` and `training` (data, configuration and metrics), as far as recorded.
    """

    path: Path
    base: str | None
    scale: int
    sampling: SamplingSettings
    lineage: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] | None = None
    base_digest: str | None = None

    @classmethod
    def read(cls, path: Path) -> "ModelFolder":
        """Raises UsageError naming `path` where it holds no DeeDSR model, or one of a newer format."""
        if (path / "model_index.json").is_file():
            description = _read_json(path / "model_index.json")
            if description.get("_class_name") != "DeeDSRPipeline":
                raise UsageError(
                    f"{path} holds a {description.get('_class_name')}, not a DeeDSRPipeline: "
                    "it can be the --base of `deedsr train adapter`, which writes a model"
                )
            base, digest, lineage = None, None, description.get("lineage") or {}
        elif (path / "deedsr.json").is_file():
            description = _read_json(path / "deedsr.json")
            version = description.get("format_version")
            if version != FORMAT_VERSION:
                newer = isinstance(version, int) and version > FORMAT_VERSION
                raise UsageError(
                    f"{path / 'deedsr.json'} has format {version}, this version of deedsr reads {FORMAT_VERSION}: "
                    + ("install a newer one" if newer else "train or save the model again")
                )
            base, digest = description.get("base"), description.get("base_digest")
            if not isinstance(base, str):
                raise UsageError(f"{path}/deedsr.json names no base")
            lineage = {name: description[name] for name in ("license", "base", "training") if name in description}
        else:
            raise UsageError(
                f"{path} is not a DeeDSR model: it has neither model_index.json nor deedsr.json; "
                "give what `deedsr train adapter` wrote, or tiny"
            )
        scale = description.get("scale")
        if not isinstance(scale, int):
            raise UsageError(f"{path} does not record its scale")
        try:
            sampling = SamplingSettings.of(description.get("sampling") or {})
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        gate = description.get("gate")
        if not isinstance(gate, dict | None):
            raise UsageError(f"{path}: gate must have weights, a list of numbers, and offset, a number")
        return cls(path, base, scale, sampling, lineage, gate, digest)

    def base_path(self, given: str | Path | None = None) -> Path:
        """Local folder of the base: `given`, else the one that the model names, a relative one in its own folder first.

        Raises UsageError where there is none, or another than the model was trained on.
        """
        if given is not None:
            path = find_base(given)
        elif self.base is None:
            return self.path
        else:
            beside = self.path / self.base
            try:
                path = find_base(beside if beside.is_dir() else self.base)
            except UsageError as error:
                raise UsageError(f"the base of {self.path} is not where it says: {error}. Give it: --base") from error
        if self.base_digest not in (None, found := base_digest(path)):
            raise UsageError(
                f"{path} is not the base that {self.path} was trained on: its digest is {found:.12}, that one's was "
                f"{self.base_digest:.12}. Give that one: --base"
            )
        return path


def find_folder(name: str | Path) -> Path:
    """Local folder of a model or base: `tiny`, a folder, or a hub id, `NAME` or `NAME@REVISION` (downloaded into the
    hub's cache).

    Raises UsageError where there is none.
    """
    if str(name) == "tiny":
        path = Path(str(files("deedsr") / "assets" / "tiny"))
        if not path.is_dir():
            raise UsageError(f"this installation of deedsr is without the model tiny ({path}): install it again")
        return path
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{path} is a file: give the folder of a model")
    if match := _HUB_ID.fullmatch(str(name)):
        return _download(match[1], match[2])
    raise UsageError(f"there is no model folder {name}: give one, a hub id such as OWNER/MODEL, or tiny")


def find_base(name: str | Path) -> Path:
    """Local folder with `vae/`, `unet/` and `scheduler/`; of a trained model, those of the base that it was trained on.

    Raises UsageError where there is none.
    """
    path = find_folder(name)
    if (path / "deedsr.json").is_file() and not (path / "unet").is_dir():
        return ModelFolder.read(path).base_path()
    missing = [part for part in BASE_PARTS if not (path / part).is_dir()]
    if missing:
        raise UsageError(
            f"the base {name} has no {' and no '.join(f'{part}/' for part in missing)}: "
            "give a Stable Diffusion model in diffusers layout, or tiny"
        )
    return path


def with_revision(name: str, folder: Path) -> str:
    """A hub id with the revision that `find_folder` downloaded to `folder`; any other name as it is."""
    match = _HUB_ID.fullmatch(name)
    return f"{match[1]}@{folder.name}" if match and folder.parent.name == "snapshots" else name


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES))
        there = [part for part in PARTS if (folder / part / "config.json").is_file()]
        if lacking := [part for part in there if not any((folder / part).glob("[!.]*.safetensors"))]:
            # There is only the half-precision variant.
            variants = [f"{part}/{NAME}.fp16*.safetensors" for part in lacking]
            snapshot_download(hub_id, revision=revision, allow_patterns=variants)
        return folder
    except Exception as error:  # the hub's client raises a dozen kinds, of requests, httpx and its own
        raise UsageError(
            f"{hub_id} is no local folder, and the model hub did not give it ({type(error).__name__}): "
            "check the name, the network and, for a private model, the login"
        ) from error


def read_config(path: Path, part: str) -> dict[str, Any]:
    """Configuration of one part of the model in `path`. UsageError where it is missing or no JSON object."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    if not (path / part / name).is_file():
        raise UsageError(f"{path} is not a complete model: {part}/{name} is missing")
    return _read_json(path / part / name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())  # bytes: json detects a byte order mark
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object")
    return value


def load_part(path: Path, part: str, **options: Any) -> Any:
    """One part of a model from its folder `path/part`: `vae`, `unet`, `scheduler`, `learner` or `adapter`.

    `options` go to diffusers' `from_pretrained` (`torch_dtype`, `variant`); the learner stays float32. Weights in half
    precision (fp16 variant) compute in float32 unless `torch_dtype` says otherwise.
    Raises UsageError where the folder is missing, holds another kind of part, or weights that do not fit its
    configuration.
    """
    from diffusers.utils import logging

    folder = path / part
    name = read_config(path, part).get("_class_name", "")
    kinds = _kinds(part)
    kind = kinds.get(name)
    if kind is None:
        wanted = "a scheduler of diffusers" if part == "scheduler" else " or ".join(sorted(kinds))
        raise UsageError(f"{folder} holds no {part}: its configuration names {name or 'nothing'}, not {wanted}")
    if part == "scheduler":
        return kind.from_pretrained(folder)
    options = {"variant": find_variant(folder)} | options
    if part == "learner":
        options.pop("torch_dtype", None)  # runs once per picture, and its running statistics are not for half precision
    # low_cpu_mem_usage needs the package accelerate, which is not a dependency.
    options = {"low_cpu_mem_usage": False} | options
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # mismatches are checked below
    try:
        module, report = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError ... by what is wrong with the file
        raise UsageError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    finally:
        logging.set_verbosity(verbosity)
    unfit = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if unfit:
        raise UsageError(f"the weights in {folder} are of another model than its config.json: {len(unfit)} tensors "
                         f"differ, such as {unfit[0]}")  # fmt: skip
    return module.eval()


def _kinds(part: str) -> dict[str, Any]:
    """Classes accepted for a part, by name."""
    import diffusers

    from deedsr.adapter.adapter import DegradationAwareAdapter
    from deedsr.learner.resnet import DegradationLearner

    if part == "scheduler":
        return {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    classes = {
        "vae": [diffusers.AutoencoderKL, diffusers.AutoencoderTiny],
        "unet": [diffusers.UNet2DConditionModel],
        "learner": [DegradationLearner],
        "adapter": [DegradationAwareAdapter],
    }
    return {kind.__name__: kind for kind in classes[part]}
