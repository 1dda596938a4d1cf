"""Defaults on a machine with a GPU: `pytest -m gpu`, which leaves out every other test. No other test sees a GPU."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from test_fit import adapter_options, learner, learner_options, shards_run, store  # noqa: F401
from test_training import base  # noqa: F401

from pipelines import machine
from pipelines.models import Model
from pipelines.training.launch import train_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch can use no GPU here"),
]


def test_a_training_takes_a_gpu_for_each_worker_and_none_when_told_so(learner, adapter_options, caplog):  # noqa: F811
    caplog.set_level(logging.INFO)
    assert train_adapter(adapter_options, progress=False).step == 3
    assert "x 1 GPU" in caplog.text
    assert "nccl" in caplog.text
    caplog.clear()
    train = dataclasses.replace(adapter_options.train, gpus_per_worker=0)
    without = dataclasses.replace(adapter_options, out=f"{adapter_options.out}-cpu", train=train)
    assert train_adapter(without, progress=False).step == 3
    assert "no GPU, gloo" in caplog.text


def test_upscaling_takes_the_gpu_unless_told_otherwise():
    assert machine.gpus() >= 1
    lr = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pictures = []
    for device in ("auto", "cpu"):
        pipeline = Model.find("tiny").load(device)
        assert pipeline.device.type == ("cuda" if device == "auto" else "cpu")
        pictures.append(np.asarray(pipeline(lr, generator=torch.Generator().manual_seed(0)).images[0]).astype(float))
    assert np.abs(pictures[0] - pictures[1]).mean() < 1
