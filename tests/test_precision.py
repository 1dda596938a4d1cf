"""bf16 forwards around fp32 weights, gradients, moments, averages and noise; compiled kernels."""

import dataclasses

import pytest
import torch
from training_process import Group, final, run, variants

from deedsr.learner.resnet import DegradationLearner
from pipelines.storage import open_storage
from pipelines.training import checkpoint
from pipelines.training.config import AdapterModelOptions, AdapterOptions, LearnerOptions
from pipelines.training.stage import compile_blocks


def held(out) -> dict[str, dict[str, torch.Tensor]]:
    storage = open_storage(str(out))
    return checkpoint.read(storage, final(out))


def steady(options):
    """Statistics of the learner's two samples would amplify rounding, and so would large steps from new weights."""
    if isinstance(options, LearnerOptions):
        model, train = dataclasses.replace(options.model, norm_group=4), dataclasses.replace(options.train, lr=1e-4)
        return dataclasses.replace(options, model=model, train=train)
    return options


CASES = [(kind, zero_stage) for kind in ("learner", "adapter") for zero_stage in (0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("kind", "zero_stage"), [pytest.param(*c, marks=[] if c == ("adapter", 0) else pytest.mark.soak) for c in CASES]
)
def test_bf16_follows_fp32_and_goes_on_bit_for_bit_at_another_number_of_workers(kind, zero_stage, tmp_path, request):
    """Weights are fp32 and are never rounded: a run that was stopped ends as one that was not."""
    options = steady(request.getfixturevalue(f"{kind}_options"))
    changes = {"max_steps": 4, "checkpoint_every": 2, "micro_batch_size": options.train.global_batch_size // 2,
               "clip_grad_norm": 0.5, "ema_decay": 0.9, "validate_every": 4, "validation_samples": 2,
               "validation_pictures": 1}  # fmt: skip
    full = run(variants(options, tmp_path / "fp32", **changes), 1)
    changes |= {"precision": "bf16", "zero_stage": zero_stage}
    undisturbed = run(variants(options, tmp_path / "undisturbed", **changes), 1).curve()
    assert undisturbed != full.curve() or kind == "learner"  # the small one keeps its few layers in full precision
    for (_, got), (_, expected) in zip(undisturbed, full.curve(), strict=True):
        assert got == pytest.approx(expected, rel=0.1)
    run(variants(options, tmp_path / "begun", **changes | {"max_steps": 2}), 1)
    expected = held(tmp_path / "undisturbed")
    assert run(variants(options, tmp_path / "begun", **changes), 2).curve() == undisturbed
    for part, tensors in held(tmp_path / "begun").items():
        for name, value in tensors.items():
            assert torch.equal(value, expected[part][name]), name
    for part, tensors in expected.items():
        values = {name: v for name, v in tensors.items() if v.is_floating_point()}
        assert all(v.dtype != torch.bfloat16 for v in values.values())
        told = {name: v for name, v in values.items() if v.unique().numel() > 9}
        rounded = [name for name, v in told.items() if torch.equal(v.bfloat16().float(), v)]
        assert not rounded, part


def test_convolutions_of_the_learner_train_in_bf16_with_fp32_gradients():
    learner = DegradationLearner(stem=8, widths=[16], blocks=[1], norm_group=4)
    picture = torch.rand(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    learner.eval()
    full = learner(picture, embedding=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = learner(picture, embedding=True)
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, full)
    torch.testing.assert_close(mixed, full, atol=0.02, rtol=0)
    mixed.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in learner.parameters())


def test_pictures_of_a_training_in_bf16_are_sampled_by_the_fp32_adapter():
    from deedsr import DeeDSRPipeline

    pipe = DeeDSRPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    sample = lambda: pipe(picture, num_inference_steps=4, output_type="pt", generator=torch.Generator()).images[0]
    full = sample()
    pipe.unet.bfloat16()
    pipe.vae.bfloat16()
    mixed = sample()
    assert not torch.equal(mixed, full)
    torch.testing.assert_close(mixed, full, atol=0.1, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_are_fp32_around_networks_in_bf16(prediction):
    """In bf16, the noise of the first two timesteps would be none, and that of the third a quarter too much."""
    from pipelines.training.adapter_stage import AdapterStage

    stage = AdapterStage(AdapterOptions(base="tiny", learner="tiny", model=AdapterModelOptions(preset="tiny")), 4)
    stage.build(torch.device("cpu"), torch.bfloat16)
    stage.scheduler.register_to_config(prediction_type=prediction)
    draw = torch.Generator().manual_seed(0)
    lr_crop, hr_crop = torch.rand(3, 3, 16, 16, generator=draw), torch.rand(3, 3, 64, 64, generator=draw)
    batch = {"lr": lr_crop, "lr_crop": lr_crop, "hr_crop": hr_crop, "timestep": torch.tensor([0, 1, 2])}
    _, z_hr, _ = stage._encoded(batch | {"encoding_noise": torch.zeros(3, 2, 1, 1, 1)})
    noise = torch.randn(z_hr.shape, generator=draw)
    batch |= {"noise": noise, "encoding_noise": torch.zeros(3, 2, 1, 1, 1), "guidance": torch.zeros(3)}

    abar = stage.scheduler.alphas_cumprod[batch["timestep"]].double().view(-1, 1, 1, 1)
    z, noise = z_hr.double(), noise.double()
    target = noise if prediction == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * z
    asked = []

    def ignorant(noisy, *_):
        asked.append(noisy)
        return torch.zeros_like(noisy)

    loss = stage.losses(ignorant, batch)
    torch.testing.assert_close(asked[0].double(), abar.sqrt() * z + (1 - abar).sqrt() * noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), target.square().mean((1, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_compiled_training_follows_the_plain_one(adapter_options, tmp_path):
    """Its kernels round otherwise, so only the first steps are near."""
    options = steady(adapter_options)
    changes = {"max_steps": 3, "checkpoint_every": 3, "hang_seconds": 0.0}
    plain = run(variants(options, tmp_path / "plain", **changes), 1).curve()
    group = Group(variants(options, tmp_path / "compiled", **changes, compile=True), 1)
    assert group.join(1500) == [0], group.log()
    for (_, got), (_, expected) in zip(group.curve(), plain, strict=True):
        assert got == pytest.approx(expected, rel=1e-2)
    assert group.curve() != plain


@pytest.mark.soak
def test_blocks_of_a_learner_are_compiled_and_give_its_vectors_and_gradients():
    def vectors_and_gradients() -> list[torch.Tensor]:
        learner.zero_grad()
        vectors = learner(torch.rand(16, 3, 48, 48, generator=torch.Generator().manual_seed(1)))
        vectors.square().sum().backward()
        return [vectors, *(parameter.grad.clone() for parameter in learner.parameters())]

    torch.manual_seed(0)
    learner = DegradationLearner(stem=8, widths=(8, 16), blocks=(1, 1), norm_group=16)
    plain = vectors_and_gradients()
    compile_blocks(learner.blocks())
    assert sum(block._compiled_call_impl is not None for block in learner.modules()) == 2
    for got, expected in zip(vectors_and_gradients(), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
