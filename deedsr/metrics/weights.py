"""Published weights files of metrics: where they lie on this machine, and their tensors.

No file is downloaded and none is unpickled: torch's own format is read with `weights_only=True`, or safetensors.
"""

import hashlib
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deedsr.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["WeightsFile", "load_into", "locate"]


@dataclass(frozen=True)
class WeightsFile:
    """A file as it is published. `sha256`: its first digits, as far as the publisher states them; `aliases`: other
    names of the same file."""

    name: str
    sha256: str
    url: str
    aliases: tuple[str, ...] = ()

    def candidates(self) -> list[str]:
        """Names that the file, or its tensors as safetensors, may have."""
        names = (self.name, *self.aliases)
        return [*names, *(str(Path(name).with_suffix(".safetensors")) for name in names)]


def locate(file: WeightsFile, metric: str, folder: Path | None = None) -> Path:
    """Where `file` lies: in `folder`, else in the cache of torch's hub, which torchvision and others download into.

    Raises UsageError where it is nowhere, or not the file that was published.
    """
    import torch

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    places = [*([folder] if folder else []), cache]
    for path in (place / name for place in places for name in file.candidates()):
        if path.is_file():
            _require_published(path, file)
            return path
    raise UsageError(
        f"{metric} needs {file.name} (its SHA-256 begins with {file.sha256}), which is not in "
        f"{' or '.join(map(str, places))}: download it from {file.url} and give its folder with --metric-weights"
    )


def _require_published(path: Path, file: WeightsFile) -> None:
    """safetensors are conversions, whose digest nobody states."""
    if path.suffix == ".safetensors":
        return
    if _is_torchscript(path):
        plain = path.with_name(file.name).with_suffix(".safetensors")
        raise UsageError(
            f"{path} is a TorchScript archive, which runs code from the file when it is loaded, and is not read: take "
            f"{file.name} from {file.url}, or, if you trust the archive and its names are the same, take its tensors "
            'out: python -c "import torch; from safetensors.torch import save_file; '
            f"save_file(torch.jit.load('{path}').state_dict(), '{plain}')\""
        )
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(file.sha256):
        raise UsageError(
            f"{path} is not the published file: its SHA-256 is {digest}, not {file.sha256}...; "
            f"download it again from {file.url}"
        )


def load_into(network: "torch.nn.Module", path: Path) -> str:
    """Load a network's tensors from a file, which may hold others too; returns the first digits of their SHA-256.

    The digest is over the names and values of what was loaded, whatever the file's format.
    Raises UsageError where the file is damaged, holds more than tensors, or weights of another network.
    """
    import torch

    stored, digest = read_tensors(path), hashlib.sha256()
    with torch.no_grad():
        for name, tensor in sorted(network.state_dict().items()):
            if name.endswith("num_batches_tracked"):  # counts training steps; not in all files
                continue
            found = stored.get(name)
            if found is None or found.shape != tensor.shape:
                has = "lacks" if found is None else f"has the shape {tuple(found.shape)} for"
                raise UsageError(
                    f"{path} holds weights of another network: it {has} {name} {tuple(tensor.shape)} of "
                    f"{type(network).__name__}"
                )
            tensor.copy_(found)
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    network.eval().requires_grad_(False)
    return digest.hexdigest()[:12]


def read_tensors(path: Path) -> dict[str, "torch.Tensor"]:
    """Tensors of a file by name. Raises UsageError for a damaged file and for one that holds more."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(f"{path} holds more than tensors, or is damaged, and is not read") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} is damaged or no weights file: {reason}") from None
    if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
        raise UsageError(f"{path} holds no mapping of names to tensors")
    return stored


def _is_torchscript(path: Path) -> bool:
    """Archives of `torch.jit.save` hold constants.pkl and code/; those of `torch.save` do not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
