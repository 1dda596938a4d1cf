"""Precision of sums that must not depend on their order."""

import torch


def widest(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the widest type of its device."""
    return x.to(widest(x.device))
