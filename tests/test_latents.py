"""Datasets of latents: what frozen networks would compute, stored once, and trained on without the pixels."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_results import differences
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from small_networks import make_pipeline
from training_process import run_processes

from deedsr.errors import DeeDSRError, UsageError
from jobs import cli
from pipelines.data.dataset import Dataset
from pipelines.data.order import SampleOrder
from pipelines.models import Base, Learner
from pipelines.shards import verify
from pipelines.shards.encode import make_latents
from pipelines.storage import publish
from pipelines.training.adapter_stage import AdapterStage
from pipelines.training.config import (
    AdapterModelOptions,
    AdapterOptions,
    DiffusionOptions,
    LearnerOptions,
    TrainOptions,
)
from pipelines.training.launch import train_adapter, train_learner

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Base and learner in one folder: an AutoencoderKL of factor 2."""
    folder = tmp_path_factory.mktemp("model") / "kl"
    make_pipeline("kl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latents(small_dataset, model, tmp_path_factory) -> Path:
    """Latents of the small dataset, read only."""
    out = tmp_path_factory.mktemp("latents") / "latents"
    make_latents(small_dataset, Base.find(model), Learner.find(model), str(out), workers=2, progress=False)
    return out


def test_keys_splits_and_order_of_samples_are_those_of_the_pixels(small_dataset, latents):
    pixels, encoded = Dataset.open(small_dataset), Dataset.open(str(latents))
    for split in ("train", "validation"):
        assert encoded.index(split)["key"].to_pylist() == pixels.index(split)["key"].to_pylist()
    orders = [
        SampleOrder(d.index("train"), d.order_digest, 0, together=False, window=2).slice(0, 200)
        for d in (pixels, encoded)
    ]
    assert orders[0] == orders[1]
    assert encoded.digest != pixels.digest


def test_what_is_stored_is_what_the_networks_compute_to_the_rounding_of_fp16(small_dataset, latents):
    from deedsr.sampling.autoencoder import latent_moments
    from deedsr.sampling.images import enlarge

    pipe = make_pipeline("kl")
    pixels, encoded = Dataset.open(small_dataset), Dataset.open(str(latents))
    for row in range(0, 136, 30):
        image, stored = pixels.read(pixels.index(), row), encoded.read_latents(encoded.index(), row)
        assert stored.key == image.key
        hr, lr = (torch.from_numpy(x).permute(2, 0, 1)[None] / 255 for x in (image.hr, image.lr))
        with torch.no_grad():
            moments = [*latent_moments(pipe.vae, 2 * hr - 1), *latent_moments(pipe.vae, 2 * enlarge(lr, 4) - 1)]
            vector = pipe.learner(lr)
        for expected, got in zip(moments, stored.latents[:4], strict=True):
            assert got.dtype == np.float16
            np.testing.assert_allclose(got, expected[0].numpy(), rtol=1e-3, atol=1e-5)
        assert stored.latents.degradation.dtype == np.float32
        np.testing.assert_allclose(stored.latents.degradation, vector[0].numpy(), rtol=1e-4, atol=1e-6)


def test_verify_reads_every_sample_and_finds_a_changed_byte(latents, tmp_path):
    assert verify(str(latents), progress=False).problems == []
    assert verify(str(latents), progress=False).samples == 136
    damaged = tmp_path / "damaged"
    shutil.copytree(latents, damaged)
    row = Dataset.open(str(damaged)).index().to_pylist()[5]
    data = bytearray((damaged / row["shard"]).read_bytes())
    data[row["latents_offset"]] ^= 0xFF  # the length of the safetensors' header
    (damaged / row["shard"]).write_bytes(data)
    found = verify(str(damaged), progress=False)
    assert (found.ok, found.samples) == (False, 135)
    assert any("SHA-256" in problem for problem in found.problems)
    assert any(f"sample {row['key']}: its latents" in problem for problem in found.problems)
    with pytest.raises(UsageError, match="--replay needs pixels"):
        verify(str(latents), replay=1, progress=False)


@pytest.mark.soak
def test_the_same_command_continues_and_gives_the_same_bytes(small_dataset, model, latents, tmp_path):
    """A run whose shards are half there makes the other half; the dataset is the one that a run from nothing makes."""
    out = tmp_path / "latents"
    shutil.copytree(latents, out)
    (out / "manifest.json").unlink()
    names = sorted(path.name for path in out.glob("*.tar"))
    for name in names[::2]:
        (out / name).unlink()
    again = make_latents(small_dataset, Base.find(model), Learner.find(model), str(out), workers=2, progress=False)
    assert (again.written, again.reused) == (len(names[::2]), len(names) - len(names[::2]))
    assert again.digest == Dataset.open(str(latents)).digest


def test_on_s3_from_the_command_line_with_an_autoencoder_without_posterior_and_no_learner(
    stored, bucket, new_store, tmp_path, capsys, monkeypatch
):
    """No posterior: means only. No learner: the LR images are kept. The run names the shards' run as parent."""
    from pipelines import tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path))
    place, pixels = f"{bucket}/{tmp_path.name}", Dataset.open(str(stored.folder / "dataset"))
    publish(stored.folder / "dataset", f"{place}/pixels")
    with tracking.start_run("shards", name="s", config={}, tags={"deedsr.kind": "shards"}, system_metrics=False) as run:
        run.log_dataset(pixels, context="shards")
    words = ["latents", "--data", f"{place}/pixels", "--base", "tiny", "--out", f"{place}/latents", "--json"]
    assert cli.main([*words, "--workers", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert differences("latents", result) == []
    assert (result["samples"], result["manifest"]) == (16, f"{place}/latents/manifest.json")
    tags = tracking.connect(tracking.tracking_uri()).get_run(result["run_id"]).data.tags
    assert tags["deedsr.parent.shards"] == run.id
    assert tags["deedsr.dataset.digest"] == result["digest"]

    encoded = Dataset.open(f"{place}/latents")
    assert encoded.manifest.latents.uri == "../pixels"
    sample = encoded.read_latents(encoded.index(), 7)
    assert (sample.latents.hr_std, sample.latents.lr_std, sample.latents.degradation) == (None, None, None)
    assert np.array_equal(sample.lr, pixels.read(pixels.index(), 7).lr)
    assert verify(f"{place}/latents", progress=False).problems == []


def test_wrong_wishes_are_one_error_that_names_the_remedy(small_dataset, latents, model, tmp_path):
    def encode(data: str, base: str, learner: str | None, out: object) -> None:
        references = Base.find(base), Learner.find(learner) if learner else None
        make_latents(data, *references, str(out), progress=False)

    with pytest.raises(UsageError, match=f"--data needs pixels: give the dataset .*{small_dataset}"):
        encode(str(latents), str(model), None, tmp_path / "x")
    with pytest.raises(UsageError, match="is the dataset that the pixels come from"):
        encode(small_dataset, str(model), None, small_dataset)
    with pytest.raises(UsageError, match="has no vae/"):
        encode(small_dataset, str(tmp_path), None, tmp_path / "x")
    with pytest.raises(UsageError, match="holds no degradation learner"):
        encode(small_dataset, str(model), str(tmp_path), tmp_path / "x")
    widths, blocks = (4,) * 9, (1,) * 9
    deep = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths,
                           num_encoder_blocks=blocks, num_decoder_blocks=blocks)  # fmt: skip
    shutil.copytree(model, tmp_path / "deep")
    deep.save_pretrained(tmp_path / "deep" / "vae")
    with pytest.raises(UsageError, match="have 128 px a side, and the VAE of .*deep takes multiples of 256"):
        encode(small_dataset, str(tmp_path / "deep"), None, tmp_path / "x")
    with pytest.raises(DeeDSRError, match="needs pixels"):
        Dataset.open(str(latents)).read(Dataset.open(str(latents)).index(), 0)
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Training on them


@pytest.fixture(scope="module")
def options(small_dataset, model) -> AdapterOptions:
    return AdapterOptions(
        data=small_dataset,
        learner=str(model),
        base=str(model),
        model=AdapterModelOptions(preset="tiny"),
        diffusion=DiffusionOptions(noise_guidance=0.5),
        train=TrainOptions(lr=1e-3, global_batch_size=4, max_steps=4, checkpoint_every=4, log_every=1),
    )


def losses(options: AdapterOptions, steps: int = 3) -> list[float]:
    """Losses of the first batches on the untrained adapter."""
    from pipelines.data.loader import micro_batches

    dataset = Dataset.open(options.data)
    stage = AdapterStage(options, dataset.scale, dataset.manifest.latents)
    adapter = stage.build(torch.device("cpu"), torch.float32)
    for parameter in adapter.parameters():  # an untrained one ignores the LR and the vector
        if not parameter.any():
            torch.manual_seed(parameter.numel())
            torch.nn.init.normal_(parameter, std=0.05)
    index = dataset.index("train")
    batches = micro_batches(
        SampleOrder(index, dataset.order_digest, 0, together=False),
        lambda epoch, row: stage.sample(dataset, index, row, epoch),
        first_step=0, last_step=steps, global_batch=4, micro=4, world_size=1, rank=0,
    )  # fmt: skip
    with torch.no_grad():
        return [float(stage.loss(adapter, batch)[0]) for batch in batches]


def test_losses_on_whole_latents_are_those_on_pixels_to_the_rounding_of_fp16(options, latents):
    on_pixels = losses(options)
    np.testing.assert_allclose(losses(dataclasses.replace(options, data=str(latents))), on_pixels, rtol=1e-3)
    assert np.ptp(on_pixels) > 0.01  # other samples and timesteps give other losses


def test_a_training_on_latents_alone_follows_the_one_on_pixels(options, latents, tmp_path):
    """The trainer's own loop, in a process that finds no pixels; its model folder is as whole."""
    alone = tmp_path / "alone"
    shutil.copytree(latents, alone)
    arms = [
        dataclasses.replace(options, data=data, out=str(tmp_path / name))
        for name, data in (("pixels", options.data), ("latents", str(alone)))
    ]
    on_pixels, on_latents = ([loss for _, loss in curve] for curve in run_processes(1, arms))
    assert len(on_pixels) == options.train.max_steps
    np.testing.assert_allclose(on_latents, on_pixels, rtol=2e-3)
    files = [sorted(p.relative_to(o.out).as_posix() for p in Path(o.out).glob("*/*.*")) for o in arms]
    assert files[0] == files[1]
    assert "learner/diffusion_pytorch_model.safetensors" in files[0]


def test_a_crop_of_latents_lies_where_the_crop_of_pixels_lies_and_meets_the_same_questions(options, latents):
    options = dataclasses.replace(options, diffusion=DiffusionOptions(lr_crop=16, noise_guidance=0.5))
    pixels, encoded = Dataset.open(options.data), Dataset.open(str(latents))
    a, b = AdapterStage(options, 4), AdapterStage(options, 4, encoded.manifest.latents)
    for stage in (a, b):
        stage.build(torch.device("cpu"), torch.float32)
    rows = pixels.index("train"), encoded.index("train")
    for row in (0, 9, 40):
        of_pixels, of_latents = a.sample(pixels, rows[0], row, 1), b.sample(encoded, rows[1], row, 1)
        for name in ("timestep", "noise", "guidance"):
            assert np.array_equal(of_pixels[name], of_latents[name]), name
        batch = {name: torch.from_numpy(np.asarray(value)[None]) for name, value in of_pixels.items()}
        with torch.no_grad():
            z_hr = a._encoded(batch)[1][0].numpy()
        assert z_hr.shape == of_latents["z_hr"].shape == (4, 32, 32)
        inner = np.s_[:, 12:-12, 12:-12]  # beyond the VAE's receptive field from the border, but for its norms
        assert np.corrcoef(z_hr[inner].ravel(), of_latents["z_hr"][inner].ravel())[0, 1] > 0.98


def test_neither_vae_nor_learner_is_loaded_and_the_pixels_may_be_gone(options, latents, model, tmp_path):
    """The trained model still holds the learner."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    alone = tmp_path / "alone"
    shutil.copytree(latents, alone)
    options = dataclasses.replace(options, data=str(alone), base=str(base))
    stage = AdapterStage(options, 4, Dataset.open(str(alone)).manifest.latents)
    adapter = stage.build(torch.device("cpu"), torch.float32)
    assert not hasattr(stage, "vae")
    assert not hasattr(stage, "learner")
    assert np.isfinite(losses(options, 1)).all()
    shutil.copy(model / "vae" / "diffusion_pytorch_model.safetensors", base / "vae")  # the export names the whole base
    stage.export(tmp_path / "model", adapter.state_dict(), {})
    stored = load_file(tmp_path / "model" / "learner" / "diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(model / "learner" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(stored[name], tensor)


def test_training_refuses_latents_of_other_networks_and_says_which(options, latents, tmp_path):
    torch.manual_seed(1)
    other = make_pipeline("kl")
    with torch.no_grad():
        next(other.vae.parameters()).add_(1)
        next(other.learner.parameters()).add_(1)
    other.save_pretrained(tmp_path / "other")
    options = dataclasses.replace(options, data=str(latents), out=str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"--base .*its VAE has digest .* and not with --learner .*"):
        train_adapter(dataclasses.replace(options, base=str(tmp_path / "other"), learner=str(tmp_path / "other")))
    with pytest.raises(UsageError, match="were not made with --learner"):
        train_adapter(dataclasses.replace(options, learner=str(tmp_path / "other")))
    pictures = dataclasses.replace(options.diffusion, pictures=True)
    with pytest.raises(UsageError, match=r"diffusion\.pictures .* holds latents: give the shards"):
        train_adapter(dataclasses.replace(options, diffusion=pictures))
    with pytest.raises(UsageError, match="the learner needs pixels"):
        train_learner(LearnerOptions(data=str(latents), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
