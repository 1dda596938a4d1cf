"""A device without float64, as Apple's MPS is: sampling computes without it."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deedsr import DeeDSRPipeline, precision


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64 that is made of pictures, latents or weights; weights of tiles are computed on the CPU anyway."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        given = [x for x in args if isinstance(x, torch.Tensor) and x.ndim > 1 and x.dtype == torch.float32]
        if given and isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise AssertionError(f"{func} made a float64 tensor of {tuple(result.shape)}")
        return result


def test_mps_has_no_float64_and_every_other_device_has():
    assert precision.widest(torch.device("mps")) == torch.float32
    assert precision.widest(torch.device("cpu")) == precision.widest(torch.device("cuda")) == torch.float64


def test_sampling_and_colour_correction_do_without_float64_where_there_is_none(monkeypatch, lr):
    pipe = DeeDSRPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    sample = lambda: np.asarray(
        pipe(lr, num_inference_steps=2, color_fix="adain", generator=torch.Generator().manual_seed(0)).images[0]
    ).astype(int)
    expected = sample()
    monkeypatch.setattr(precision, "widest", lambda device: torch.float32)
    with WithoutFloat64():
        narrow = sample()
    assert np.abs(narrow - expected).mean() < 0.5
    for module in (pipe.vae, pipe.unet, pipe.learner, pipe.adapter):
        assert all(tensor.dtype != torch.float64 for tensor in [*module.parameters(), *module.buffers()])
