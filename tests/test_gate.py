"""The restoration gate: how much of the sampled picture a result takes."""

import json

import numpy as np
import pytest
import torch
from small_networks import make_pipeline
from torch.nn.functional import avg_pool2d

from deedsr.errors import UsageError
from deedsr.hub.model_folder import ModelFolder
from deedsr.sampling.gate import RestorationGate, blend
from deedsr.sampling.images import enlarge
from deedsr.sampling.pipeline import DeeDSRPipeline
from pipelines.models import Model

OPTIONS = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe() -> DeeDSRPipeline:
    return make_pipeline("tiny", **{"num_inference_steps": 2})


def gated(pipe: DeeDSRPipeline, weight: float, offset: float) -> DeeDSRPipeline:
    """The same model with a gate that looks at the first entry of the vector."""
    width = pipe.adapter.config["degradation_dim"]
    gate = {"weights": [weight] + [0.0] * (width - 1), "offset": offset}
    return DeeDSRPipeline(**pipe.components, sampling=pipe.config["sampling"], gate=gate)


def sampled(pipe: DeeDSRPipeline, lr: np.ndarray, **options) -> torch.Tensor:
    return pipe(lr, generator=torch.Generator().manual_seed(0), **OPTIONS | options).images


def test_restoration_blends_the_sampled_picture_with_the_bicubic_enlargement(pipe, lr):
    crop = lr[:16, :20]
    bicubic = enlarge(torch.from_numpy(crop).permute(2, 0, 1)[None] / 255, 4)
    whole = sampled(pipe, crop)
    assert torch.equal(sampled(pipe, crop, restoration=1.0), whole)
    torch.testing.assert_close(sampled(pipe, crop, restoration=0.0), bicubic)
    coarse = enlarge(avg_pool2d(whole, 4), 4)
    expected = 0.3 * coarse + 0.7 * bicubic + 0.6 * (whole - coarse)
    torch.testing.assert_close(sampled(pipe, crop, restoration=0.3), expected.clamp(0, 1), atol=1e-5, rtol=0)


def test_the_gate_follows_the_degradation_vector_alone_and_an_explicit_share_overrides_it(pipe, lr):
    crops = [lr[:16, :16], np.full((16, 16, 3), 90, np.uint8)]
    own = gated(pipe, weight=0.7, offset=-0.2)
    for crop in crops:
        x = torch.from_numpy(crop).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            share = float(torch.sigmoid(0.7 * pipe.learner(x)[0, 0] - 0.2))
        assert 0.05 < share < 0.95
        torch.testing.assert_close(sampled(own, crop), sampled(pipe, crop, restoration=share), atol=1e-5, rtol=0)
        assert torch.equal(sampled(own, crop, restoration=1.0), sampled(pipe, crop))
    together = own(crops, generator=torch.Generator().manual_seed(0), **OPTIONS).images
    for picture, crop in zip(together, crops, strict=True):
        torch.testing.assert_close(picture[None], sampled(own, crop), atol=1e-4, rtol=0)


def test_half_a_restoration_keeps_all_of_the_detail_and_an_eighth_keeps_a_quarter():
    colour = torch.full((2, 3, 16, 16), 0.4)
    checks = 0.1 * ((torch.arange(16)[:, None] + torch.arange(16)) % 2) - 0.05  # of which each LR pixel's average is 0
    picture = colour + 0.2 + checks
    blend(picture, lambda rows: colour[:, :, rows], torch.tensor([0.5, 0.125]), 4)
    expected = torch.stack([colour[0] + 0.1 + checks, colour[1] + 0.025 + checks / 4])
    torch.testing.assert_close(picture, expected)


def test_a_large_picture_is_blended_in_strips_as_a_small_one(monkeypatch):
    picture, reference = (torch.rand(2, 3, 40, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    shares, whole = torch.tensor([0.2, 0.9]), picture.clone()
    blend(whole, lambda rows: reference[:, :, rows], shares, 4)
    monkeypatch.setattr("deedsr.sampling.images.STRIP", 7 * 16)
    blend(picture, lambda rows: reference[:, :, rows], shares, 4)
    torch.testing.assert_close(picture, whole)


def test_a_saved_model_keeps_its_gate_and_one_without_is_loaded_as_before(pipe, lr, tmp_path):
    for name, model in (("plain", pipe), ("gated", gated(pipe, 1.0, 0.5))):
        model.save_pretrained(tmp_path / name)
    index = json.loads((tmp_path / "plain/model_index.json").read_text())
    assert index.pop("gate") is None
    (tmp_path / "plain/model_index.json").write_text(json.dumps(index))  # as older versions wrote it
    assert ModelFolder.read(tmp_path / "plain").gate is None
    crop = lr[:16, :16]
    plain, own = (DeeDSRPipeline.from_pretrained(tmp_path / name) for name in ("plain", "gated"))
    assert torch.equal(sampled(plain, crop), sampled(plain, crop, restoration=1.0))
    assert not torch.equal(sampled(own, crop), sampled(own, crop, restoration=1.0))


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"weights": [1.0], "offset": 0.0}, "the gate is for degradation vectors of 1, the learner gives"),
        ({"weights": "many", "offset": 0.0}, "gate must have weights"),
        ({"weights": [1.0], "offset": None}, "gate must have weights"),
    ],
)
def test_a_gate_that_is_none_or_of_another_learner_is_refused(gate, message):
    with pytest.raises(UsageError, match=message):
        RestorationGate.of(gate, 2)


def test_restoration_must_be_a_share(pipe, lr):
    with pytest.raises(UsageError, match="restoration must be a number from 0 to 1, got 1.5"):
        sampled(pipe, lr[:8, :8], restoration=1.5)


def test_a_gate_is_not_taken_along_to_another_base(pipe, lr, tmp_path):
    gated(pipe, 1.0, 0.5).save_pretrained(tmp_path / "gated")
    own, elsewhere = (
        DeeDSRPipeline.from_pretrained(tmp_path / "gated", base=base) for base in (None, tmp_path / "gated")
    )
    assert own.config["gate"] is not None
    assert elsewhere.config["gate"] is None


def test_commands_load_a_model_with_its_gate_and_know_it_from_one_without(pipe, tmp_path):
    for name, model in (("plain", pipe), ("gated", gated(pipe, 1.0, 0.5))):
        model.save_pretrained(tmp_path / name)
    plain, own = (Model.find(tmp_path / name) for name in ("plain", "gated"))
    assert own.load("cpu").config["gate"] is not None
    assert own.digest != plain.digest
