"""Precision of fp32 products on GPUs, and of sums that must not depend on their order."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_tf32(enabled: bool) -> None:
    """Whether GPUs round the inputs of fp32 matrix products and convolutions to 10 bits of mantissa (TF32).

    PyTorch's own default is off for products and on for convolutions.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products and convolutions in full fp32: neither autocast nor TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    set_tf32(False)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def widest(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the widest type of its device."""
    return x.to(widest(x.device))
