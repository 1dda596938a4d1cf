"""Defaults on a machine with a GPU: `pytest -m gpu`, which leaves out every other test. No other test sees a GPU."""

import numpy as np
import pytest
import torch

from pipelines import machine
from pipelines.models import Model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch can use no GPU here"),
]


def test_upscaling_takes_the_gpu_unless_told_otherwise():
    assert machine.gpus() >= 1
    lr = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pictures = []
    for device in ("auto", "cpu"):
        pipeline = Model.find("tiny").load(device)
        assert pipeline.device.type == ("cuda" if device == "auto" else "cpu")
        pictures.append(np.asarray(pipeline(lr, generator=torch.Generator().manual_seed(0)).images[0]).astype(float))
    assert np.abs(pictures[0] - pictures[1]).mean() < 1
