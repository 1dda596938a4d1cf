"""Degradation-aware adapter: the paper's size, a start that disturbs nothing, a base that stays what it is."""

import copy
import hashlib

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from small_networks import inputs, tiny_unet, wake
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from deedsr.adapter import DegradationAwareAdapter
from deedsr.adapter.adapter import cross_attentions, residual_blocks
from deedsr.adapter.cross_attention import CrossAttentionProcessor
from deedsr.adapter.da_block import DegradationAwareConv, DegradationAwareGroup
from tools.tiny.base import UNET

SD21_BASE = {  # Stable Diffusion 2.1-base; the rest is the class's defaults
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def digest(module: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def adapter_of(unet: UNet2DConditionModel, tokens: str = "new_kv") -> DegradationAwareAdapter:
    torch.manual_seed(1)
    adapter = DegradationAwareAdapter.for_unet(unet, "tiny", degradation_dim=12, tokens=tokens)
    adapter.initialize_from(unet)
    adapter.attach(unet)
    return adapter


def train_one_step(adapter: DegradationAwareAdapter) -> None:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    (adapter(*inputs()) - inputs()[0]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(scope="module")
def full_size():
    """Stable Diffusion 2.1-base and the paper's adapter, without memory for their weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD21_BASE)
        return unet, DegradationAwareAdapter.for_unet(unet, "paper")


def test_paper_preset_has_the_papers_parameters(full_size):
    unet, adapter = full_size
    assert count(unet) == 865_910_724
    assert count(adapter.condition_encoder) == 75_903_744
    groups = [m for m in adapter.modules() if isinstance(m, DegradationAwareGroup)]
    assert sum(map(count, groups)) == 33_775_104
    assert (len(adapter.modulations), count(adapter.modulations)) == (22, 52_979_840)
    assert (len(adapter.attentions), count(adapter.attentions)) == (16, 37_572_800)
    keys_values = [layer for attention in adapter.attentions for layer in (attention.to_k, attention.to_v)]
    assert sum(map(count, keys_values)) == 12_779_520
    assert count(adapter) == 166_456_384


def test_tokens_and_features_have_the_papers_shapes(full_size):
    unet, adapter = full_size
    latents = torch.empty(2, 4, 64, 128, device="meta")  # a 512 x 1024 picture
    t, vector = torch.empty(2, device="meta"), torch.empty(2, 1024, device="meta")
    condition = adapter.condition_encoder(latents, t, vector)
    assert condition.tokens.shape == (2, 8 * 16, 512)
    assert [tuple(f.shape) for f in condition.features] == [(2, 256, 64 >> i, 128 >> i) for i in range(4)]
    adapter.attach(unet)
    assert adapter(latents, t, latents, vector).shape == latents.shape
    adapter.detach()


def test_levels_follow_the_unet_not_the_width(full_size):
    levels = {name: level for name, level, _ in residual_blocks(full_size[0])}
    assert [levels[f"down_blocks.{i}.resnets.1"] for i in range(4)] == [0, 1, 2, 3]
    assert levels["mid_block.resnets.0"] == 3
    assert [levels[f"up_blocks.{i}.resnets.2"] for i in range(4)] == [3, 2, 1, 0]


def test_tiny_preset_is_the_same_code_and_small():
    adapter = DegradationAwareAdapter.for_unet(tiny_unet(), "tiny")
    assert (len(adapter.modulations), len(adapter.attentions)) == (11, 4)
    assert count(adapter) < 2_600_000


def test_time_embedding_has_cosines_first():
    encoder = DegradationAwareAdapter.for_unet(tiny_unet(), "tiny").condition_encoder
    embedding = encoder.time_proj(torch.tensor([0, 10]))
    half = embedding.shape[1] // 2
    frequencies = 10_000 ** (-torch.arange(half) / half)
    assert embedding[0].tolist() == [1.0] * half + [0.0] * half
    torch.testing.assert_close(embedding[1], torch.cat([(10 * frequencies).cos(), (10 * frequencies).sin()]))


def test_each_sample_is_convolved_with_kernels_of_its_own():
    torch.manual_seed(0)
    conv = DegradationAwareConv(8, reduction=2)
    x, view = torch.randn(3, 8, 6, 5), torch.randn(3, 8)
    together = conv(x, conv.prepare(view))
    for i in range(3):
        kernels = conv.kernels(view[i]).view(8, 1, 3, 3)
        blurred = nn.functional.conv2d(x[i : i + 1], kernels, padding=1, groups=8)
        weights = 2 * torch.sigmoid(conv.attention(view[i])).view(1, 8, 1, 1)
        expected = conv.mix(nn.functional.silu(blurred)) + x[i : i + 1] * weights
        torch.testing.assert_close(together[i : i + 1], expected)
    assert not torch.allclose(conv(x, conv.prepare(view.flip(0))), together)


def test_degradation_aware_group_starts_as_the_identity_and_then_depends_on_the_degradation():
    torch.manual_seed(0)
    group = DegradationAwareGroup(8, degradation_dim=5, reduction=2)
    x, vector = torch.randn(2, 8, 4, 4), torch.rand(2, 5)
    assert torch.equal(group(x, vector), x)
    nn.init.normal_(group.conv.weight)
    assert not torch.allclose(group(x, vector), group(x, vector.flip(0)))


@torch.no_grad()
def test_local_branch_starts_as_the_identity():
    unet = tiny_unet()
    adapter = adapter_of(unet)
    noisy, t, z_lr, vector = inputs()
    modulated = adapter(noisy, t, z_lr, vector)
    tokens = adapter.condition_encoder(z_lr, t, vector).tokens
    adapter.detach()
    for (_, attention), ours in zip(cross_attentions(unet), adapter.attentions, strict=True):
        attention.processor = CrossAttentionProcessor(ours)
    assert torch.equal(unet(noisy, t, tokens).sample, modulated)


def test_every_level_of_the_local_branch_and_the_encoder_learn_after_one_step():
    adapter = adapter_of(tiny_unet())
    train_one_step(adapter)
    adapter(*inputs()).square().mean().backward()
    for name, module in adapter.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name.startswith(("modulations", "condition_encoder.levels")):
            assert module.weight.grad.any(), name
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name


def test_training_leaves_the_base_as_it_was():
    unet = tiny_unet()
    keys, before = list(unet.state_dict()), digest(unet)
    parameters = [name for name, _ in unet.named_parameters()]
    adapter = adapter_of(unet)
    train_one_step(adapter)
    train_one_step(adapter)
    assert list(unet.state_dict()) == keys
    assert [name for name, _ in unet.named_parameters()] == parameters
    assert digest(unet) == before
    assert all(p.grad is None and not p.requires_grad for p in unet.parameters())
    assert {id(p) for p in adapter.parameters()}.isdisjoint({id(p) for p in unet.parameters()})


@torch.no_grad()
def test_detach_gives_the_unet_back():
    unet = tiny_unet()
    noisy, t, *_ = inputs()
    tokens = torch.randn(2, 5, 128)
    before = unet(noisy, t, tokens).sample
    adapter = adapter_of(unet)
    wake(adapter)
    adapter(*inputs())
    with pytest.raises(RuntimeError, match="detach"):
        unet(noisy, t, tokens)
    with pytest.raises(ValueError, match="has an adapter attached"):
        adapter_of(unet)
    adapter.detach()
    assert torch.equal(unet(noisy, t, tokens).sample, before)
    with pytest.raises(RuntimeError, match="attach the adapter"):
        adapter(*inputs())


@torch.no_grad()
def test_projected_tokens_start_from_the_bases_own_cross_attention():
    unet = tiny_unet()
    noisy, t, z_lr, vector = inputs()
    adapter = adapter_of(unet, tokens="project")
    told = adapter(noisy, t, z_lr, vector)
    tokens = adapter.token_projection(adapter.condition_encoder(z_lr, t, vector).tokens)
    adapter.detach()
    assert torch.equal(unet(noisy, t, tokens).sample, told)


def test_adapter_of_another_geometry_is_refused():
    adapter = DegradationAwareAdapter.for_unet(tiny_unet(), "tiny")
    wider = UNet2DConditionModel(**UNET | {"block_out_channels": (32, 96, 128)})
    with pytest.raises(ValueError, match=r"down_blocks\.0\.resnets\.0"):
        adapter.attach(wider)


def test_latents_that_the_levels_cannot_halve_are_refused():
    adapter = adapter_of(tiny_unet())
    noisy, t, z_lr, vector = inputs()
    with pytest.raises(ValueError, match="multiples of 4, got 14x12"):
        adapter(noisy[:, :, :14], t, z_lr[:, :, :14], vector)


@torch.no_grad()
def test_each_sample_of_a_batch_is_told_about_its_own_image():
    adapter = adapter_of(tiny_unet())
    wake(adapter)
    batch = inputs(4)
    together = adapter(*batch)
    for i in range(4):
        alone = adapter(*(part[i : i + 1] for part in batch))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)
    noisy, t, z_lr, vector = batch
    for other in ((noisy, t, z_lr.flip(0), vector), (noisy, t, z_lr, vector.flip(0))):
        assert not torch.allclose(adapter(*other), together, atol=1e-3)


@torch.no_grad()
def test_a_known_condition_replaces_the_image():
    adapter = adapter_of(tiny_unet())
    wake(adapter)
    noisy, t, z_lr, vector = inputs()
    condition = adapter.condition_encoder(z_lr, t, vector)
    assert torch.equal(adapter(noisy, t, condition=condition), adapter(noisy, t, z_lr, vector))


@torch.no_grad()
def test_what_the_vector_alone_decides_may_be_prepared_once_for_many_samples():
    adapter = adapter_of(tiny_unet())
    wake(adapter)
    noisy, t, z_lr, vector = inputs()
    prepared = adapter.condition_encoder.prepare(vector)
    assert torch.equal(adapter(noisy, t, z_lr, prepared), adapter(noisy, t, z_lr, vector))
    first = torch.zeros(len(vector), dtype=torch.long)
    expected = adapter(noisy, t, z_lr, vector[first])
    torch.testing.assert_close(adapter(noisy, t, z_lr, prepared.of(first)), expected)
    assert not torch.allclose(expected, adapter(noisy, t, z_lr, vector), atol=1e-3)


def test_gradient_checkpointing_changes_no_gradient_even_with_sampling_in_between():
    gradients = []
    for checkpointing in (False, True):
        unet = tiny_unet()
        adapter = adapter_of(unet)
        wake(adapter)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            adapter.enable_gradient_checkpointing()
        loss = adapter(*inputs()).square().mean()
        with torch.no_grad():
            adapter(*(part.flip(0) for part in inputs()))
        loss.backward()
        gradients.append({name: p.grad for name, p in adapter.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_trains(autocast):
    unet = tiny_unet()
    adapter = adapter_of(unet)
    wake(adapter)
    expected = adapter(*inputs()).detach()
    noisy, t, z_lr, vector = inputs()
    if not autocast:
        unet.bfloat16()
        adapter.bfloat16()
        noisy, z_lr, vector = noisy.bfloat16(), z_lr.bfloat16(), vector.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = adapter(noisy, t, z_lr, vector)
    output.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    assert (output.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@torch.no_grad()
def test_saved_adapter_returns_exactly(tmp_path):
    unet = tiny_unet()
    adapter = adapter_of(unet, tokens="project")
    wake(adapter)
    expected = adapter.eval()(*inputs())
    adapter.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = DegradationAwareAdapter.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in adapter.state_dict().items())
    adapter.detach()
    again.attach(unet)
    assert torch.equal(again(*inputs()), expected)


def test_channels_last_of_the_base_is_kept_through_the_hooks_of_the_adapter():
    unet = tiny_unet().to(memory_format=torch.channels_last)
    adapter = adapter_of(unet)
    wake(adapter)
    seen = []
    for _, _, block in residual_blocks(unet):
        block.conv2.register_forward_hook(lambda conv, inputs, output: seen.append(output))
    adapter(*inputs())
    assert len(seen) == len(residual_blocks(unet))
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in seen)


class FusedAttentions(TorchFunctionMode):
    """Collects queries and masks of the calls of torch's fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append((args[0], kwargs["attn_mask"]))
        return func(*args, **kwargs or {})


def test_every_attention_at_stable_diffusions_size_fits_the_flash_kernel(full_size):
    unet, adapter = (network.bfloat16() for network in copy.deepcopy(full_size))
    adapter.attach(unet)
    latents = torch.empty(2, 4, 64, 64, device="meta", dtype=torch.bfloat16)
    vector = torch.empty(2, 1024, device="meta", dtype=torch.bfloat16)
    with FusedAttentions() as fused, torch.no_grad():
        adapter(latents, torch.empty(2, device="meta"), latents, vector)
    replaced = len(adapter.attentions)  # each in place of one of the UNet's
    assert len(fused.seen) == sum(isinstance(m, Attention) for n in (unet, adapter) for m in n.modules()) - replaced
    for query, mask in fused.seen:
        assert mask is None
        assert query.dtype == torch.bfloat16
        assert query.shape[-1] <= 256
        assert query.shape[-1] % 8 == 0


def test_a_training_step_in_bf16_needs_no_other_attention_than_flash():
    adapter = adapter_of(tiny_unet())
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), torch.autocast("cpu", torch.bfloat16):
        adapter(*inputs()).square().mean().backward()


def test_blocks_that_are_compiled_hold_most_parameters_once():
    unet = tiny_unet()
    adapter = adapter_of(unet)
    blocks = list(adapter.blocks())
    assert len({id(part) for block in blocks for part in block.modules()}) == sum(
        1 for block in blocks for _ in block.modules()
    )
    assert sum(map(count, blocks)) > 0.6 * (count(unet) + count(adapter))
