"""Weights files for the networks of LPIPS, DISTS and FID, with made-up values: the published ones are not shipped."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from deedsr.metrics.networks import VGG16, AlexNet, HannPooling, InceptionV3


def made_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors that follow from their names and shapes alone, sized so that activations neither vanish nor explode."""
    state = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        values = np.random.Generator(np.random.PCG64(seed)).random(shape, np.float32) * 2 - 1
        if len(shape) == 4:
            values *= math.sqrt(6 / math.prod(shape[1:]))
        elif name.endswith(("running_var", "bn.weight")):
            values = 1 + 0.3 * values
        else:
            values *= 0.1
        state[name] = torch.from_numpy(values)
    return state


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if tensor.dim()}


def write_weights(folder: Path) -> Path:
    """`folder` with the three files as safetensors; each holds a tensor that no metric needs, as the published do."""
    networks = {
        AlexNet.file.name: AlexNet(),
        VGG16.file.name: VGG16(HannPooling),
        InceptionV3.file.name: InceptionV3(),
    }
    for name, network in networks.items():
        state = made_state(shapes_of(network)) | {"classifier.bias": torch.zeros(1000)}
        save_file(state, (folder / name).with_suffix(".safetensors"))
    return folder
