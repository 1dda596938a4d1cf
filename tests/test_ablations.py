"""Ablations: each leaves out what it says, with its parameters, and nothing else; configured, stored and loaded."""

import dataclasses
import json
from dataclasses import asdict

import pytest
import torch
from diffusers import UNet2DConditionModel
from small_networks import inputs, tiny_unet, wake
from torch import nn

from benchmarks.full_size import UNET
from deedsr.adapter import ABLATIONS, DegradationAwareAdapter
from deedsr.adapter.da_block import DegradationAwareGroup
from deedsr.errors import UsageError
from jobs.command import Command, Outcome
from jobs.options import CommandParser
from pipelines.training.config import AdapterModelOptions, AdapterOptions, check
from pipelines.training.identity import TrainingRecord

OWN = "condition_encoder.constant_vector"  # the one parameter that an ablation adds


def adapter_of(unet: UNet2DConditionModel, *ablate: str, like: DegradationAwareAdapter | None = None, **options):
    """An adapter that has learned something; the weights it shares with `like` are the same."""
    torch.manual_seed(1)
    adapter = DegradationAwareAdapter.for_unet(unet, "tiny", degradation_dim=12, ablate=ablate, **options)
    adapter.initialize_from(unet)
    wake(adapter)
    if like is not None:
        theirs = like.state_dict()
        adapter.load_state_dict({name: theirs.get(name, t) for name, t in adapter.state_dict().items()})
    return adapter


def output(adapter: DegradationAwareAdapter, unet: UNet2DConditionModel, *asked: torch.Tensor) -> torch.Tensor:
    adapter.attach(unet)
    try:
        with torch.no_grad():
            return adapter(*asked)
    finally:
        adapter.detach()


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture(scope="module")
def full(unet):
    return adapter_of(unet)


@pytest.mark.parametrize(
    ("ablation", "gone", "new"),
    [
        ("vector", (), {OWN}),
        ("global", ("attentions.", "condition_encoder.mid"), set()),
        ("local", ("modulations.", "condition_encoder.features."), set()),
        ("da", tuple(f"condition_encoder.levels.{level}.aware." for level in range(3)), set()),
    ],
)
def test_what_is_left_out_has_no_parameters_and_the_rest_all_of_them(unet, full, ablation, gone, new):
    names = {name for name, _ in full.named_parameters()}
    expected = {name for name in names if not name.startswith(gone)} if gone else names
    assert {name for name, _ in adapter_of(unet, ablation).named_parameters()} == expected | new


def test_at_full_size_the_parts_weigh_what_the_paper_says():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        sizes = {
            name: sum(
                p.numel() for p in DegradationAwareAdapter.for_unet(unet, ablate=[name] if name else []).parameters()
            )
            for name in ("", *ABLATIONS)
        }
    assert sizes[""] == 166_456_384
    assert sizes["vector"] - sizes[""] == 1024
    assert sizes[""] - sizes["da"] == 33_775_104
    assert sizes[""] - sizes["local"] - 52_979_840 == pytest.approx(7.22e6, abs=0.01e6)  # the four feature blocks
    assert sizes[""] - sizes["global"] - 37_572_800 == pytest.approx(11.545e6, abs=0.001e6)  # the middle block


def test_without_the_vector_every_image_has_the_same_learned_one(unet, full):
    noisy, t, z_lr, vector = inputs()
    ablated = adapter_of(unet, "vector", like=full)
    told = output(ablated, unet, noisy, t, z_lr, vector)
    assert torch.equal(told, output(ablated, unet, noisy, t, z_lr, vector.flip(0)))
    constant = ablated.condition_encoder.constant_vector.detach().expand(2, -1)
    torch.testing.assert_close(told, output(full, unet, noisy, t, z_lr, constant))
    assert not torch.allclose(told, output(ablated, unet, noisy, t, z_lr.flip(0), vector))


def test_without_da_blocks_their_groups_are_the_identity(unet, full):
    ablated = adapter_of(unet, "da", like=full)
    without = adapter_of(unet, like=full)
    for group in without.modules():
        if isinstance(group, DegradationAwareGroup):
            nn.init.zeros_(group.conv.weight)
            nn.init.zeros_(group.conv.bias)
    told = output(ablated, unet, *inputs())
    torch.testing.assert_close(told, output(without, unet, *inputs()))
    assert not torch.allclose(told, output(full, unet, *inputs()))


def test_without_the_local_branch_the_residual_blocks_are_the_bases(unet, full):
    without = adapter_of(unet, like=full)
    for modulation in without.modulations:
        for conv in (modulation.gamma, modulation.beta):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
    told = output(adapter_of(unet, "local", like=full), unet, *inputs())
    torch.testing.assert_close(told, output(without, unet, *inputs()))
    assert not torch.allclose(told, output(full, unet, *inputs()))


@pytest.mark.parametrize("tokens", ["new_kv", "project"])
def test_without_the_global_branch_the_bases_own_attention_sees_one_token_of_zeros(unet, tokens):
    """By the base's own layers: to_k and to_v have no bias, so cross-attention adds to_out's bias and nothing else."""
    full = adapter_of(unet, tokens=tokens)
    silent = adapter_of(unet, like=full, tokens=tokens)
    for attention in silent.attentions:
        nn.init.zeros_(attention.to_out[0].weight)
    for attention, (name, *_) in zip(silent.attentions, silent.config["cross_attentions"], strict=True):
        attention.to_out[0].bias.data.copy_(unet.get_submodule(name).to_out[0].bias)
    told = output(adapter_of(unet, "global", like=full, tokens=tokens), unet, *inputs())
    torch.testing.assert_close(told, output(silent, unet, *inputs()))
    assert not torch.allclose(told, output(full, unet, *inputs()))


@pytest.mark.parametrize(
    ("ablate", "checkpointing"),
    [*(([name], False) for name in ABLATIONS), (["vector", "local"], True), (["da", "global"], True)],
)
def test_what_is_left_in_learns(ablate, checkpointing):
    unet = tiny_unet()
    adapter = adapter_of(unet, *ablate)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        adapter.enable_gradient_checkpointing()
    adapter.attach(unet)
    adapter(*inputs()).square().mean().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() or name.endswith("to_k.weight"), name


@pytest.mark.parametrize("ablate", [["global"], ["da"], ["vector", "local"]])
def test_a_saved_ablation_returns_exactly(unet, tmp_path, ablate):
    adapter = adapter_of(unet, *ablate)
    expected = output(adapter, unet, *inputs())
    adapter.save_pretrained(tmp_path)
    again = DegradationAwareAdapter.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert again.config["ablate"] == ablate
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in adapter.state_dict().items())
    torch.testing.assert_close(output(again, unet, *inputs()), expected)  # memory lies otherwise: kernels may round


def test_leaving_out_both_branches_or_something_unknown_is_refused(unet):
    with pytest.raises(ValueError, match="nothing that tells the base"):
        adapter_of(unet, "global", "local")
    with pytest.raises(ValueError, match="vector, global, local, da, got 'attention'"):
        adapter_of(unet, "attention")
    with pytest.raises(UsageError, match=r"model\.ablate global and local"):
        check(AdapterOptions(model=AdapterModelOptions(ablate=["local", "global"])))


def test_ablations_are_options_of_the_command():
    words = ["--data", "d", "--learner", "l", "--out", "o", "--model.ablate"]
    read = lambda *names: CommandParser("train adapter", Command(AdapterOptions, Outcome, "")).read([*words, *names])
    assert read("vector", "da").options.model.ablate == ["vector", "da"]
    with pytest.raises(UsageError, match=r"model\.ablate takes vector or global or local or da, got"):
        read("attention")


def test_a_training_from_before_there_were_ablations_continues_as_the_full_method():
    options = AdapterOptions(data="d", learner="l", out="o")
    before = json.loads(json.dumps(asdict(options)))
    del before["model"]["ablate"], before["license"]
    record = TrainingRecord("adapter", before, inputs={}, run_id="")
    record.refuse_differences(options, {})
    ablated = dataclasses.replace(options, model=AdapterModelOptions(ablate=["da"]))
    with pytest.raises(UsageError, match=r"model\.ablate was \[\], is \['da'\]"):
        record.refuse_differences(ablated, {})


@pytest.mark.parametrize("ablate", [["local", "vector"], ["da", "global"]])
def test_training_and_sampling_take_an_ablation_from_configuration_and_folder(tmp_path, ablate):
    """What `train adapter` would train and write, without training it."""
    from deedsr import DeeDSRPipeline
    from pipelines.training.adapter_stage import AdapterStage

    model = AdapterModelOptions(preset="tiny", ablate=ablate)
    stage = AdapterStage(AdapterOptions(base="tiny", learner="tiny", model=model), 4)
    adapter = stage.build(torch.device("cpu"), torch.float32)
    assert adapter.config["ablate"] == ablate
    assert not (adapter.modulations if "local" in ablate else adapter.attentions)
    weights = {name: tensor + 0.01 for name, tensor in adapter.state_dict().items()}
    stage.export(tmp_path, weights, {})
    pipe = DeeDSRPipeline.from_pretrained(tmp_path)
    assert pipe.adapter.config["ablate"] == ablate
    assert pipe.adapter.config["prediction_type"] == "v_prediction"
    assert all(torch.equal(weights[name], t) for name, t in pipe.adapter.state_dict().items())
    assert f"| left out | {', '.join(ablate)} |" in (tmp_path / "README.md").read_text()
    pipe.set_progress_bar_config(disable=True)
    assert pipe(torch.rand(3, 8, 8), num_inference_steps=2).images[0].size == (32, 32)
