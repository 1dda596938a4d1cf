"""Claims about models on disk: what is saved comes back, what is not a whole model is refused by name."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from small_networks import make_pipeline

from deedsr.errors import UsageError
from deedsr.sampling.pipeline import DeeDSRPipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(result) -> np.ndarray:
    return np.asarray(result.images[0]).astype(int)


def test_a_saved_pipeline_comes_back_exactly(lr, tmp_path):
    pipe = make_pipeline("kl", num_inference_steps=3, noise_guidance_share=0.4, color_fix="none")
    pipe.save_pretrained(tmp_path / "model")
    again = DeeDSRPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert (again.scale, again.sampling) == (pipe.scale, pipe.sampling)
    for name in ("vae", "unet", "learner", "adapter"):
        before, after = (getattr(p, name).state_dict() for p in (pipe, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    crop = lr[:16, :16]
    assert np.array_equal(pixels(pipe(crop, generator=seeded())), pixels(again(crop, generator=seeded())))
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in (tmp_path / "model").rglob("*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `deedsr train adapter` writes, beside its base."""
    folder = tmp_path_factory.mktemp("trained")
    pipe = make_pipeline("kl")
    pipe.vae.save_pretrained(folder / "base" / "vae")
    pipe.unet.save_pretrained(folder / "base" / "unet")
    PNDMScheduler.from_config(pipe.scheduler.config).save_pretrained(folder / "base" / "scheduler")
    pipe.learner.save_pretrained(folder / "model" / "learner")
    pipe.adapter.save_pretrained(folder / "model" / "adapter")
    description = {"format_version": 1, "base": "../base", "scale": 4, "sampling": {"num_inference_steps": 2}}
    (folder / "model" / "deedsr.json").write_text(json.dumps(description))
    return folder


def test_a_trained_folder_finds_its_base_and_samples_by_ddim(trained, lr, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pipe = DeeDSRPipeline.from_pretrained(trained / "model")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    assert pipe.sampling.num_inference_steps == 2
    pipe.scheduler.set_timesteps(50)
    assert pipe.scheduler.timesteps[0] == 981
    assert pipe(lr[:8, :8]).images[0].size == (32, 32)


def test_networks_load_and_sample_in_the_dtype_asked_for(trained, lr):
    pipe = DeeDSRPipeline.from_pretrained(trained / "model", torch_dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.adapter.dtype, pipe.vae.dtype} == {torch.bfloat16}
    assert pipe(lr[:8, :8]).images[0].size == (32, 32)
    pipe.to(torch.float32)
    assert pipe(lr[:8, :8]).images[0].size == (32, 32)


def test_weights_stored_in_half_precision_compute_in_full(trained, lr, tmp_path):
    model = copy_of(trained, tmp_path)
    pipe = DeeDSRPipeline.from_pretrained(model)
    pipe.adapter.half().save_pretrained(model / "adapter")
    pipe.learner.half().save_pretrained(model / "learner")
    again = DeeDSRPipeline.from_pretrained(model)
    assert {again.learner.dtype, again.adapter.dtype} == {torch.float32}
    assert again(lr[:8, :8]).images[0].size == (32, 32)


def copy_of(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy" / "model"


def test_a_folder_that_is_no_model_is_refused_with_the_remedy(trained, tmp_path):
    for folder, message in (
        (tmp_path / "nothing", "there is no model folder"),
        (tmp_path, "neither model_index.json nor deedsr.json"),
        (trained / "base", "neither model_index.json nor deedsr.json"),
        (trained / "model" / "deedsr.json", "is a file"),
    ):
        with pytest.raises(UsageError, match=message):
            DeeDSRPipeline.from_pretrained(folder)
    with pytest.raises(UsageError, match="the model hub did not give it"):
        DeeDSRPipeline.from_pretrained("nobody/nothing")


def test_a_damaged_or_foreign_part_is_one_clear_error(trained, tmp_path):
    model = copy_of(trained, tmp_path)
    weights = model / "adapter" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="adapter cannot be loaded"):
        DeeDSRPipeline.from_pretrained(model)
    weights.write_bytes((model / "learner" / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(UsageError, match="adapter.* (cannot be loaded|of another model)"):
        DeeDSRPipeline.from_pretrained(model)
    weights.unlink()
    with pytest.raises(UsageError, match="adapter holds no weights: diffusion_pytorch_model.safetensors is missing"):
        DeeDSRPipeline.from_pretrained(model)
    weights.write_bytes(whole)

    (model / "adapter" / "config.json").rename(model / "adapter" / "other.json")
    with pytest.raises(UsageError, match="adapter/config.json is missing"):
        DeeDSRPipeline.from_pretrained(model)
    (model / "adapter" / "config.json").write_text((model / "learner" / "config.json").read_text())
    with pytest.raises(UsageError, match="names DegradationLearner, not DegradationAwareAdapter"):
        DeeDSRPipeline.from_pretrained(model)


def test_an_adapter_of_another_base_is_refused(trained, tmp_path):
    torch.manual_seed(0)
    other = UNet2DConditionModel(
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    with pytest.raises(UsageError, match="does not fit its base"):
        DeeDSRPipeline.from_pretrained(trained / "model", unet=other)


def test_a_missing_base_is_refused_by_name(trained, tmp_path):
    model = copy_of(trained, tmp_path)
    description = json.loads((model / "deedsr.json").read_text())
    (model / "deedsr.json").write_text(json.dumps(description | {"base": "../gone"}))
    with pytest.raises(UsageError, match="gone"):
        DeeDSRPipeline.from_pretrained(model)
    pipe = DeeDSRPipeline.from_pretrained(model, base=trained / "base")
    assert pipe.scale == 4


TRAINING = {
    "dataset": {"digest": "ab" * 32, "recipe": "deedsr", "samples": 88},
    "step": 3,
    "samples_seen": 12,
    "metrics": {"validation/psnr_y": 21.5},
    "prediction_type": "v_prediction",
    "configuration": {"model": {"ablate": ["da"]}},
}


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_trained_folder_becomes_a_whole_model_with_its_lineage_card_and_licences(trained, lr, tmp_path):
    model = copy_of(trained, tmp_path)
    description = json.loads((model / "deedsr.json").read_text())
    lineage = {"base": "../base", "license": "apache-2.0", "training": TRAINING}
    (model / "deedsr.json").write_text(json.dumps(description | lineage))
    (model.parent / "base" / "LICENSE.md").write_text("what the base may be used for")
    pipe = DeeDSRPipeline.from_pretrained(model)
    pipe.save_pretrained(tmp_path / "whole")
    again = DeeDSRPipeline.from_pretrained(tmp_path / "whole")
    assert again.config["lineage"] == lineage
    assert again.sampling == pipe.sampling
    for name in ("vae", "unet", "learner", "adapter"):
        before, after = (getattr(p, name).state_dict() for p in (pipe, again))
        assert all(torch.equal(before[key], after[key]) for key in before)
    card = (tmp_path / "whole" / "README.md").read_text()
    for told in (
        "license: apache-2.0",
        "ab" * 32,
        "| pairs in it | 88 |",
        "| `validation/psnr_y` | 21.5 |",
        "| left out | da |",
    ):
        assert told in card
    assert "apache-2.0" in (tmp_path / "whole" / "LICENSE").read_text()
    assert (tmp_path / "whole" / "LICENSE-base").read_text() == "what the base may be used for"
    again.save_pretrained(tmp_path / "once more")
    first, second = files_of(tmp_path / "whole"), files_of(tmp_path / "once more")
    assert first.keys() == second.keys()
    same = {name for name in first if not name.endswith("config.json")}  # these note where they were loaded from
    assert {name for name in same if first[name] != second[name]} <= {"model_index.json"}


def test_what_nobody_recorded_is_said_to_be_unknown(tmp_path):
    make_pipeline("kl").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "license: other" in card
    assert "Not recorded." in card
    assert "no licence was named" in (tmp_path / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("version", "remedy"),
    [(2, "install a newer one"), (0, "train or save the model again"), (None, "reads 1"), ("1", "")],
)
def test_a_folder_of_another_format_is_refused_with_the_remedy(trained, tmp_path, version, remedy):
    model = copy_of(trained, tmp_path)
    description = json.loads((model / "deedsr.json").read_text())
    (model / "deedsr.json").write_text(json.dumps(description | {"format_version": version}))
    with pytest.raises(UsageError, match=f"deedsr.json has format {version}, .*{remedy}"):
        DeeDSRPipeline.from_pretrained(model)


def test_a_hub_id_is_served_from_the_hubs_cache_without_a_network(trained, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from deedsr.hub.model_folder import find_base

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache, revision = tmp_path / "models--somebody--stable-diffusion", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(trained / "base", cache / "snapshots" / revision)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    model = copy_of(trained, tmp_path)
    description = json.loads((model / "deedsr.json").read_text())
    (model / "deedsr.json").write_text(json.dumps(description | {"base": "somebody/stable-diffusion"}))
    assert find_base("somebody/stable-diffusion") == cache / "snapshots" / revision
    assert DeeDSRPipeline.from_pretrained(model).scale == 4


def test_of_a_hub_only_what_is_used_is_downloaded():
    from huggingface_hub.utils import filter_repo_objects

    from deedsr.hub.model_folder import HUB_FILES

    wanted = {
        *("model_index.json", "LICENSE.md", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"),
        *(
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        ),
        "vae/diffusion_pytorch_model.safetensors",
    }
    others = {
        *("text_encoder/model.safetensors", "text_encoder/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
        *("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json", "v2-1_512-ema-pruned.ckpt"),
        *("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"),
        *("unet/diffusion_pytorch_model.non_ema.safetensors", "vae_1_0/diffusion_pytorch_model.safetensors"),
    }
    assert set(filter_repo_objects(wanted | others, allow_patterns=HUB_FILES)) == wanted


@torch.no_grad()
def test_the_base_alone_is_no_better_than_bicubic_and_worse_than_with_its_adapter(photos):
    """`tiny`'s base has never seen a low-resolution image: asked for the rest of a picture whose first steps are guided
    wholly by the LR latent, as its adapter is, it only adds errors."""
    from deedsr.metrics import psnr_y

    pipe = DeeDSRPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    hrs = []
    for name in ("Green-Maple.jpg", "Yellow-Flower.jpg"):
        image = cv2.cvtColor(cv2.imread(str(photos / "validation" / name)), cv2.COLOR_BGR2RGB)
        top, left = (side // 2 - 64 for side in image.shape[:2])
        hrs.append(image[top : top + 128, left : left + 128])
    lrs = [cv2.GaussianBlur(cv2.resize(hr, (32, 32), interpolation=cv2.INTER_AREA), (0, 0), 0.8) for hr in hrs]
    bicubic = [cv2.resize(lr, (128, 128), interpolation=cv2.INTER_CUBIC) for lr in lrs]

    def quality(pictures) -> float:
        return float(np.mean([psnr_y(np.asarray(p), hr, 4) for p, hr in zip(pictures, hrs, strict=True)]))

    told = quality(pipe(lrs, generator=seeded()).images)
    pipe.adapter.detach()
    blank = torch.zeros(1, 1, pipe.unet.config["cross_attention_dim"])
    pipe.adapter.forward = lambda noisy, t, *_, **__: pipe.unet(noisy, t, blank.expand(len(noisy), -1, -1)).sample
    alone = quality(pipe(lrs, generator=seeded()).images)
    print(f"PSNR-Y: base alone {alone:.2f}, bicubic {quality(bicubic):.2f}, with the adapter {told:.2f}")
    assert alone < quality(bicubic)
    assert alone < told
