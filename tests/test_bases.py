"""Claims about bases: every layout of Stable Diffusion loads, what the adapter cannot stand on is refused by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from small_networks import SCHEDULE, make_pipeline

from deedsr.adapter import DegradationAwareAdapter
from deedsr.errors import UsageError
from deedsr.hub.base import check_base
from deedsr.hub.model_folder import find_base, load_part
from deedsr.learner.resnet import DegradationLearner
from deedsr.presets import LEARNER_PRESETS
from deedsr.sampling.pipeline import DeeDSRPipeline
from deedsr.sampling.schedule import ddim
from pipelines.data.dataset import Dataset
from pipelines.models import Learner
from pipelines.training.checks import check_adapter_data
from pipelines.training.config import AdapterOptions, DiffusionOptions
from pipelines.training.launch import train_adapter

UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
}
# What tells the versions apart: heads by level or one number (of heads, whatever its name says), the width of the text
# that the cross-attention was trained with, linear or convolutional projection around it.
GEOMETRIES = {
    "2.1": {"attention_head_dim": (2, 4), "cross_attention_dim": 32, "use_linear_projection": True},
    "1.5": {"attention_head_dim": 8, "cross_attention_dim": 24, "use_linear_projection": False},
}
BETAS = {name: SCHEDULE[name] for name in ("beta_start", "beta_end", "beta_schedule")}
WEIGHTS = "diffusion_pytorch_model"


def write_base(folder: Path, geometry: str = "2.1", scheduler=PNDMScheduler, **schedule) -> Path:
    """A small base as Stable Diffusion comes from the hub, text encoder included: one that nothing could load."""
    torch.manual_seed(0)
    UNet2DConditionModel(**UNET | GEOMETRIES[geometry]).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ).save_pretrained(folder / "vae")
    scheduler(**BETAS, **schedule).save_pretrained(folder / "scheduler")
    for part, name in (("text_encoder", "model.safetensors"), ("tokenizer", "vocab.json")):
        (folder / part).mkdir()
        (folder / part / name).write_bytes(b"nothing that could be loaded")
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base")


def copied(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "base")
    return tmp_path / "base"


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sampled(base: Path, **options) -> np.ndarray:
    """Loads every part of a base as training and sampling do, and samples two steps with a new adapter."""
    check_base(base)
    vae, unet, scheduler = (load_part(base, part) for part in ("vae", "unet", "scheduler"))
    torch.manual_seed(1)
    learner = DegradationLearner(**LEARNER_PRESETS["tiny"]).eval()
    adapter = DegradationAwareAdapter.for_unet(unet, "tiny", degradation_dim=learner.dim, **options)
    adapter.initialize_from(unet)
    pipe = DeeDSRPipeline(vae, unet, ddim(scheduler), learner, adapter.eval())
    pipe.set_progress_bar_config(disable=True)
    lr = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "color_fix": "none"}
    return pipe(lr, output_type="np", **options).images[0]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("tokens", ["new_kv", "project"])
def test_a_base_of_either_geometry_is_loaded_without_its_text_encoder(tmp_path, geometry, tokens):
    base = write_base(tmp_path / "base", geometry)
    assert np.isfinite(sampled(base, tokens=tokens)).all()
    unet = load_part(base, "unet")
    heads = [attn.heads for name, attn in unet.named_modules() if name.endswith("attn2")]
    adapter = DegradationAwareAdapter.for_unet(unet, "tiny", tokens=tokens)
    assert [attention.heads for attention in adapter.attentions] == heads
    assert heads[0] == {"2.1": 2, "1.5": 8}[geometry]
    widths = {attention.to_k.in_features for attention in adapter.attentions}
    assert widths == {GEOMETRIES[geometry]["cross_attention_dim"] if tokens == "project" else 96}


def test_shards_half_precision_and_old_names_hold_the_same_base(base, tmp_path):
    expected = sampled(base)
    unet, vae = load_part(base, "unet"), load_part(base, "vae")

    sharded = copied(base, tmp_path / "sharded")
    (sharded / "unet" / f"{WEIGHTS}.safetensors").unlink()
    unet.save_pretrained(sharded / "unet", max_shard_size="60KB")
    assert len(list((sharded / "unet").glob("*-of-*.safetensors"))) > 1
    check_base(sharded)
    assert equal(load_part(sharded, "unet"), unet)

    old = copied(base, tmp_path / "old")  # as the VAEs of Stable Diffusion are stored
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(old / "vae" / f"{WEIGHTS}.safetensors")
    for new, before in names.items():
        tensors = {key.replace(f".{new}.", f".{before}."): tensor for key, tensor in tensors.items()}
    save_file(tensors, old / "vae" / f"{WEIGHTS}.safetensors", {"format": "pt"})
    check_base(old)
    assert equal(load_part(old, "vae"), vae)

    half = copied(base, tmp_path / "half")
    for part, network, options in (("unet", unet, {"max_shard_size": "30KB"}), ("vae", vae, {})):
        (half / part / f"{WEIGHTS}.safetensors").unlink()
        network.half().save_pretrained(half / part, variant="fp16", **options)
    assert all("fp16" in path.name for path in half.rglob("*.safetensors") if "text_encoder" not in path.parts)
    assert load_part(half, "unet").dtype == torch.float32
    np.testing.assert_allclose(sampled(half), expected, atol=0.05)
    assert load_part(half, "unet", torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_whole_weights_are_taken_before_a_variant(base, tmp_path):
    both = copied(base, tmp_path)
    (both / "unet" / f"{WEIGHTS}.fp16.safetensors").write_bytes(b"not even a file of weights")
    assert load_part(both, "unet").dtype == torch.float32
    check_base(both)


def break_weights(base: Path) -> None:
    path = base / "unet" / f"{WEIGHTS}.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def pickle_them(base: Path) -> None:
    (base / "unet" / f"{WEIGHTS}.safetensors").rename(base / "unet" / f"{WEIGHTS}.bin")


def lose_a_shard(base: Path) -> None:
    unet = load_part(base, "unet")
    (base / "unet" / f"{WEIGHTS}.safetensors").unlink()
    unet.save_pretrained(base / "unet", max_shard_size="60KB")
    next((base / "unet").glob("*-00002-of-*")).unlink()


UNET_CONFIG, VAE_CONFIG, SCHEDULER_CONFIG = "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: (base / "vae" / "config.json").unlink(), "vae/config.json is missing"),
        (lambda base: (base / "vae" / f"{WEIGHTS}.safetensors").unlink(), "vae holds no weights"),
        (pickle_them, r"diffusion_pytorch_model.bin is not read: save it as safetensors"),
        (break_weights, "safetensors cannot be read"),
        (lose_a_shard, "-00002-of-.* is missing"),
        (lambda base: edit(base / UNET_CONFIG, cross_attention_dim=768), "attn2.to_k.weight has shape .*32.*768"),
        (lambda base: edit(base / UNET_CONFIG, block_out_channels=(32, 64)), "conv_in.weight has shape"),
        (lambda base: edit(base / UNET_CONFIG, in_channels=9), "takes 9 channels and gives 4, .* inpainting"),
        (lambda base: edit(base / UNET_CONFIG, addition_embed_type="text_time"), "addition_embed_type text_time"),
        (lambda base: edit(base / UNET_CONFIG, down_block_types=["DownBlock2D"] * 2), "no cross-attention"),
        (lambda base: edit(base / VAE_CONFIG, latent_channels=16), "latents have 16 channels, the UNet takes 4"),
        (lambda base: edit(base / SCHEDULER_CONFIG, prediction_type="flow"), "prediction_type flow, there are epsilon"),
        (lambda base: edit(base / SCHEDULER_CONFIG, _class_name="FlowMatchEulerDiscreteScheduler"), "flow-matching"),
        (lambda base: edit(base / SCHEDULER_CONFIG, rescale_betas_zero_snr=True), "max_timestep 999"),
    ],
)
def test_what_the_adapter_cannot_stand_on_is_one_clear_error(base, tmp_path, damage, message):
    broken = copied(base, tmp_path)
    damage(broken)
    with pytest.raises(UsageError, match=message):
        check_base(find_base(broken))


def test_training_refuses_such_a_base_before_it_starts_anything(base, tmp_path, small_dataset):
    broken = copied(base, tmp_path)
    edit(broken / UNET_CONFIG, in_channels=9)
    DegradationLearner(**LEARNER_PRESETS["tiny"]).save_pretrained(tmp_path / "learner")
    options = AdapterOptions(small_dataset, str(tmp_path / "learner"), str(broken), str(tmp_path / "out"))
    with pytest.raises(UsageError, match="inpainting"):
        train_adapter(options, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffusion": DiffusionOptions(lr_crop=21)}, "diffusion.lr_crop 21 gives training pictures of 84 px, .* base "
         "tiny takes multiples of 16: give --diffusion.lr_crop 20 or another multiple of 4, or shards"),
        ({"diffusion": DiffusionOptions(lr_crop=3)}, "diffusion.lr_crop 3 .* 16: give shards with a crop.size"),
        ({"sampling": {"num_inference_step": 20}}, "sampling: unknown sampling setting 'num_inference_step'"),
        ({"sampling": {"eta": 2.0}}, "sampling: eta must be"),
        ({"learner": "without weights"}, "holds no weights"),
    ],
)  # fmt: skip
def test_what_the_workers_could_not_use_is_refused_before_anything_starts(change, message, tmp_path, small_dataset):
    if "learner" in change:
        DegradationLearner(**LEARNER_PRESETS["tiny"]).save_pretrained(tmp_path / "learner")
        (tmp_path / "learner" / f"{WEIGHTS}.safetensors").unlink()
        change = {"learner": str(tmp_path / "learner")}
    options = AdapterOptions(data=small_dataset, learner="tiny", base="tiny", out=str(tmp_path / "out"))
    with pytest.raises(UsageError, match=message):
        train_adapter(dataclasses.replace(options, **change), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_crop_that_is_trained_on_whole_is_measured_too(base, tmp_path, small_dataset):
    """Crops of 128 px, on a base whose UNet halves them eight times."""
    deep = copied(base, tmp_path)
    edit(deep / UNET_CONFIG, block_out_channels=[16] * 8)
    options = AdapterOptions(small_dataset, "tiny", str(deep), str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"the recipe's crop.size 128 .* takes multiples of 256: give shards with"):
        check_adapter_data(options, Dataset.open(small_dataset), deep, Learner.find("tiny").path)


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def test_a_schedule_that_ends_without_signal_is_sampled_from_its_end(tmp_path):
    base = write_base(tmp_path / "base", scheduler=EulerDiscreteScheduler, prediction_type="v_prediction", **ZERO_SNR)
    check_base(base)
    scheduler = ddim(load_part(base, "scheduler"))
    scheduler.set_timesteps(4)
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert scheduler.alphas_cumprod[-1] == 0
    assert np.isfinite(sampled(base)).all()


@pytest.mark.parametrize(
    ("prediction", "strength"), [("v_prediction", 0.0), ("v_prediction", 0.5), ("v_prediction", 1.0), ("sample", 0.5)]
)
def test_sampling_without_signal_is_finite_whatever_the_guidance(prediction, strength):
    pipe = make_pipeline("kl", prediction)
    pipe.scheduler = DDIMScheduler(**SCHEDULE | ZERO_SNR, prediction_type=prediction)
    lr = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    settings = {"noise_guidance": strength, "noise_guidance_share": 0.5, "num_inference_steps": 3}
    assert np.isfinite(pipe(lr, output_type="np", **settings).images[0]).all()


def test_without_signal_the_first_step_takes_the_clean_latent_from_v():
    """At abar = 0, x_t is noise alone and v is -x_0: the answer must not depend on the noise."""
    from deedsr.adapter.objective import clean_latent, model_output

    z, noise, nothing = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4), torch.zeros(())
    v = model_output(z, noise, nothing, "v_prediction")
    assert torch.equal(v, -z)
    assert torch.equal(clean_latent(v, noise, nothing, "v_prediction"), z)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_training_without_signal_asks_for_the_hr_whatever_the_guidance_and_the_weight(prediction):
    """At the last timestep x_t is noise alone: a base that answers with the HR latent has no loss there, and one that
    answers with nothing has a finite one, weighted by min(SNR, gamma) or not."""
    from deedsr.adapter.objective import model_output
    from pipelines.training.adapter_stage import AdapterStage

    draw = torch.Generator().manual_seed(0)
    z_lr, z_hr, noise = (torch.randn(3, 4, 4, 4, generator=draw) for _ in range(3))
    batch = {"z_lr": z_lr, "z_hr": z_hr, "noise": noise, "degradation": torch.zeros(3, 8)}
    batch |= {"timestep": torch.tensor([999, 999, 500]), "guidance": torch.tensor([0.0, 1.0, 0.5])}
    for gamma in (0.0, 5.0):
        stage = AdapterStage(AdapterOptions(diffusion=DiffusionOptions(snr_gamma=gamma)), 4)
        stage.unet = torch.nn.Linear(1, 1)
        stage.scheduler = DDIMScheduler(**SCHEDULE | ZERO_SNR, prediction_type=prediction)

        def knowing(noisy, t, *_, scheduler=stage.scheduler):
            return model_output(z_hr, noisy, scheduler.alphas_cumprod[t].view(-1, 1, 1, 1), prediction)

        assert stage.losses(knowing, batch).max() < 1e-6
        ignorant = stage.losses(lambda noisy, *_: torch.zeros_like(noisy), batch)
        assert ignorant.isfinite().all()
        if not gamma:
            torch.testing.assert_close(ignorant[:2], z_hr[:2].square().mean((1, 2, 3)))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_eps_without_signal_is_refused_and_fine_where_signal_is_left(scheduler):
    pipe = make_pipeline("kl", "epsilon")
    config = BETAS | {"rescale_betas_zero_snr": True}
    lr = np.zeros((8, 8, 3), np.uint8)
    pipe.scheduler = scheduler(**config, timestep_spacing="trailing")
    with pytest.raises(UsageError, match="epsilon is undefined at timestep 999"):
        pipe(lr, num_inference_steps=2)
    pipe.scheduler = scheduler(**config, timestep_spacing="leading")
    assert np.isfinite(pipe(lr, num_inference_steps=2, output_type="np").images[0]).all()


def test_an_adapter_trained_for_another_prediction_is_refused(base, tmp_path):
    pipe = make_pipeline("kl", "epsilon")
    pipe.adapter.detach()
    parts = {name: getattr(pipe, name) for name in ("vae", "unet", "learner")}
    adapter = DegradationAwareAdapter.for_unet(pipe.unet, "tiny", prediction_type="epsilon")
    pipe = DeeDSRPipeline(**parts, scheduler=DDIMScheduler(**SCHEDULE), adapter=adapter)
    pipe.save_pretrained(tmp_path)
    swapped = DDIMScheduler(**SCHEDULE, prediction_type="v_prediction")
    message = "trained with prediction_type epsilon, the scheduler DDIMScheduler has v_prediction"
    with pytest.raises(UsageError, match=message):
        DeeDSRPipeline.from_pretrained(tmp_path, scheduler=swapped)
    pipe.scheduler = swapped
    with pytest.raises(UsageError, match=message):
        pipe(np.zeros((8, 8, 3), np.uint8), num_inference_steps=1)
