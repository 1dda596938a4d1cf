"""Frozen networks of the learned metrics, with the state-dict names of the published weights files.

No file is downloaded and none is unpickled: torch's own format is read with `weights_only=True`, or safetensors.

Shapes: B batch, C channels, H W pixels.
"""

import hashlib
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d, relu

from deedsr.errors import UsageError

__all__ = [
    "SIDE",
    "VGG16",
    "AlexNet",
    "HannPooling",
    "InceptionV3",
    "PublishedNetwork",
    "WeightsFile",
    "load_into",
    "locate",
    "read_tensors",
]

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # of VGG16: channels and convolutions between poolings
SIDE = 299  # pixels of the input of Inception v3


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


class PublishedNetwork(nn.Module):
    """A network whose weights are published."""

    file: ClassVar[WeightsFile]


class AlexNet(PublishedNetwork):
    """The convolutions of AlexNet (Krizhevsky 2014), named as in torchvision's file.

    `forward(x_BCHW)` returns what the five ReLUs give: 64, 192, 384, 256 and 256 channels.
    """

    file = WeightsFile(
        "alexnet-owt-7be5be79.pth", "7be5be79", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    )

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        found = []
        for layer in self.features:
            x_BCHW = layer(x_BCHW)
            if isinstance(layer, nn.ReLU):
                found.append(x_BCHW)
        return found


class VGG16(PublishedNetwork):
    """The convolutions of VGG16 (Simonyan and Zisserman 2015) with a given pooling, named as in torchvision's file.

    `forward(x_BCHW)` returns the last feature map of each of the five stages. `pooling`: made for each gap.
    """

    file = WeightsFile("vgg16-397923af.pth", "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth")

    def __init__(self, pooling: Callable[[], nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends, inputs = [], 3
        for channels, convolutions in STAGES:
            layers += [pooling()] if layers else []
            for _ in range(convolutions):
                layers += [nn.Conv2d(inputs, channels, kernel_size=3, padding=1), nn.ReLU()]
                inputs = channels
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        found = []
        for number, layer in enumerate(self.features):
            x_BCHW = layer(x_BCHW)
            if number in self.ends:
                found.append(x_BCHW)
        return found


class HannPooling(nn.Module):
    """L2 pooling of DISTS: the root of the squares' mean in a 3x3 Hann window, at every second pixel."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        taps = torch.hann_window(5, periodic=False, dtype=x_BCHW.dtype, device=x_BCHW.device)[1:-1]
        window = torch.outer(taps, taps) / taps.sum().square()
        channels = x_BCHW.shape[1]
        squares = conv2d(x_BCHW.square(), window.expand(channels, 1, 3, 3), stride=2, padding=1, groups=channels)
        return (squares + 1e-12).sqrt()


Kernel = int | tuple[int, int]
ROW, COLUMN = (1, 7), (7, 1)
MEAN = partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAX = partial(max_pool2d, kernel_size=3, stride=1, padding=1)
REDUCE = partial(max_pool2d, kernel_size=3, stride=2)


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU. Without stride it keeps the size of its input unless `padded` is False."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel = 1, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (sides[0] // 2, sides[1] // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x_BCHW)))


Step = str | tuple[str, str] | Callable[[Tensor], Tensor]


class Mixed(nn.Module):
    """Parallel branches whose outputs are joined along the channels.

    A branch is a sequence of steps: the name of a convolution, two names whose outputs are joined, or a pooling.
    """

    def __init__(self, convolutions: Mapping[str, Convolution], branches: Sequence[Sequence[Step]]) -> None:
        super().__init__()
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)
        self.branches = branches

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.cat([self._along(branch, x_BCHW) for branch in self.branches], dim=1)

    def _along(self, branch: Sequence[Step], x_BCHW: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, tuple):
                x_BCHW = torch.cat([self.get_submodule(name)(x_BCHW) for name in step], dim=1)
            else:
                x_BCHW = (self.get_submodule(step) if isinstance(step, str) else step)(x_BCHW)
        return x_BCHW


def _chain(name: str, inputs: int, *layers: tuple[int, Kernel]) -> dict[str, Convolution]:
    """`name_1`, `name_2`, ...: convolutions one after the other, given by output channels and kernel."""
    made = {}
    for number, (outputs, kernel) in enumerate(layers, start=1):
        made[f"{name}_{number}"] = Convolution(inputs, outputs, kernel)
        inputs = outputs
    return made


def _block_a(inputs: int, pooled: int) -> Mixed:
    return Mixed(
        {"branch1x1": Convolution(inputs, 64)}
        | _chain("branch5x5", inputs, (48, 1), (64, 5))
        | _chain("branch3x3dbl", inputs, (64, 1), (96, 3), (96, 3))
        | {"branch_pool": Convolution(inputs, pooled)},
        [
            ["branch1x1"],
            ["branch5x5_1", "branch5x5_2"],
            ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
            [MEAN, "branch_pool"],
        ],
    )


def _block_b(inputs: int) -> Mixed:
    return Mixed(
        {"branch3x3": Convolution(inputs, 384, 3, stride=2)}
        | _chain("branch3x3dbl", inputs, (64, 1), (96, 3))
        | {"branch3x3dbl_3": Convolution(96, 96, 3, stride=2)},
        [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], [REDUCE]],
    )


def _block_c(inputs: int, width: int) -> Mixed:
    return Mixed(
        {"branch1x1": Convolution(inputs, 192)}
        | _chain("branch7x7", inputs, (width, 1), (width, ROW), (192, COLUMN))
        | _chain("branch7x7dbl", inputs, (width, 1), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW))
        | {"branch_pool": Convolution(inputs, 192)},
        [
            ["branch1x1"],
            [f"branch7x7_{number}" for number in range(1, 4)],
            [f"branch7x7dbl_{number}" for number in range(1, 6)],
            [MEAN, "branch_pool"],
        ],
    )


def _block_d(inputs: int) -> Mixed:
    return Mixed(
        {"branch3x3_1": Convolution(inputs, 192), "branch3x3_2": Convolution(192, 320, 3, stride=2)}
        | _chain("branch7x7x3", inputs, (192, 1), (192, ROW), (192, COLUMN))
        | {"branch7x7x3_4": Convolution(192, 192, 3, stride=2)},
        [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{number}" for number in range(1, 5)], [REDUCE]],
    )


def _block_e(inputs: int, pooling: Callable[[Tensor], Tensor]) -> Mixed:
    split = lambda name, inputs: {
        f"{name}a": Convolution(inputs, 384, (1, 3)),
        f"{name}b": Convolution(inputs, 384, (3, 1)),
    }
    return Mixed(
        {"branch1x1": Convolution(inputs, 320), "branch3x3_1": Convolution(inputs, 384)}
        | split("branch3x3_2", 384)
        | _chain("branch3x3dbl", inputs, (448, 1), (384, 3))
        | split("branch3x3dbl_3", 384)
        | {"branch_pool": Convolution(inputs, 192)},
        [
            ["branch1x1"],
            ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
            ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
            [pooling, "branch_pool"],
        ],
    )


class InceptionV3(PublishedNetwork):
    """Inception v3 of FID: TensorFlow's network of 2015-12-05, named as in the file that pytorch-fid publishes.

    It differs from torchvision's: average pooling counts no padding, and the last block pools by maximum.
    `forward(x_BCHW)`, RGB in -1..1, returns 2,048 features of each picture: means over the last feature maps.
    """

    file = WeightsFile(
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        # torch-fidelity's name for it, and the TorchScript archive of clean-fid, which is refused
        aliases=("weights-inception-2015-12-05-6726825d.pth", "inception-2015-12-05.pt"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padded=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, MEAN)
        self.Mixed_7c = _block_e(2048, MAX)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x_BCHW = REDUCE(x_BCHW)
            x_BCHW = layer(x_BCHW)
        return x_BCHW.mean(dim=(2, 3))


def locate(file: WeightsFile, metric: str, folder: Path | None = None) -> Path:
    """Where `file` lies: in `folder`, else in the cache of torch's hub, which torchvision and others download into.

    Raises UsageError where it is nowhere, or not the file that was published.
    """
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
    """Refuse other files and TorchScript. Of safetensors, which are conversions, no digest is published."""
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


def load_into(network: nn.Module, path: Path) -> str:
    """Load a network's tensors from a file, which may hold others too; returns the first digits of their SHA-256.

    The digest covers the names and values of the loaded tensors and does not depend on the file's format.
    Raises UsageError where the file is damaged, holds more than tensors, or weights of another network.
    """
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file by name. Raises UsageError for a damaged file and for one that holds more."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(f"{path} holds more than tensors, or is damaged, and is not read") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} is damaged or no weights file: {reason}") from None
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise UsageError(f"{path} holds no mapping of names to tensors")
    return stored


def _is_torchscript(path: Path) -> bool:
    """Archives of `torch.jit.save` hold constants.pkl and code/; those of `torch.save` do not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
