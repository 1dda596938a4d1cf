"""bf16 on top of fp32 master weights, moments, averages and momentum encoder; compiled kernels."""

import dataclasses
import shutil

import pytest
import torch
from test_failures import final, trained_learner  # noqa: F401
from test_training import adapter_options, base, learner_options, variants  # noqa: F401
from training_process import Group, run

from pipelines.storage import open_storage
from pipelines.training import checkpoint
from pipelines.training.config import LearnerOptions


def held(out) -> dict[str, dict[str, torch.Tensor]]:
    storage = open_storage(str(out))
    return {part: checkpoint._read(storage, final(out), part) for part in checkpoint.PARTS}


def steady(options):
    """Statistics of the learner's two samples would amplify rounding, and so would large steps from new weights."""
    if isinstance(options, LearnerOptions):
        model, train = dataclasses.replace(options.model, norm_group=4), dataclasses.replace(options.train, lr=1e-4)
        return dataclasses.replace(options, model=model, train=train)
    return options


CASES = [(kind, zero_stage) for kind in ("learner", "adapter") for zero_stage in (1, 2, 3)]


@pytest.mark.parametrize(
    ("kind", "zero_stage"), [pytest.param(*c, marks=[] if c == ("learner", 2) else pytest.mark.soak) for c in CASES]
)
def test_bf16_follows_fp32_keeps_fp32_masters_and_goes_on_at_another_number_of_workers(
    kind, zero_stage, tmp_path, request
):
    options = steady(request.getfixturevalue(f"{kind}_options"))
    changes = {"max_steps": 6, "checkpoint_every": 3, "micro_batch_size": options.train.global_batch_size // 2,
               "clip_grad_norm": 0.5, "ema_decay": 0.9}  # fmt: skip
    full = run(variants(options, tmp_path / "fp32", **changes), 1)
    changes |= {"precision": "bf16", "zero_stage": zero_stage}
    run(variants(options, tmp_path / "begun", **changes | {"max_steps": 3}), 1)
    curves = []
    for world_size in (1, 2):
        shutil.copytree(tmp_path / "begun", tmp_path / f"{world_size}")
        curves.append(dict(run(variants(options, tmp_path / f"{world_size}", **changes), world_size).curve()))
    assert curves[0] == curves[1]
    for step, loss in full.curve():
        assert curves[0][step] == pytest.approx(loss, rel=0.1)
    one, two = held(tmp_path / "1"), held(tmp_path / "2")
    for part, tensors in one.items():
        for name, value in tensors.items():
            assert torch.equal(value, two[part][name]), name
            assert value.dtype != torch.bfloat16, name
    for part, prefix in (
        ("trained", ""),
        ("optimizer", ""),
        ("state", "ema."),
        ("state", "stage.contrast.key_encoder."),
    ):
        values = [v for name, v in one[part].items() if name.startswith(prefix) and v.is_floating_point()]
        assert values or prefix == "stage.contrast.key_encoder." and kind == "adapter"
        assert all(v.dtype == torch.float32 for v in values)
        assert not values or any((v.bfloat16().float() != v).any() for v in values), f"{part} {prefix} was rounded"


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["learner", "adapter"])
def test_a_compiled_training_follows_the_plain_one(kind, tmp_path, request):
    """Its kernels round otherwise, so only the first steps are near."""
    options = steady(request.getfixturevalue(f"{kind}_options"))
    changes = {"max_steps": 3, "checkpoint_every": 3, "hang_seconds": 0.0}
    plain = run(variants(options, tmp_path / "plain", **changes), 1).curve()
    group = Group(variants(options, tmp_path / "compiled", **changes, compile=True), 1)
    assert group.join(1500) == [0], group.log()
    for (_, got), (_, expected) in zip(group.curve(), plain, strict=True):
        assert got == pytest.approx(expected, rel=1e-2)
    assert group.curve() != plain
