"""The base of a model: which one it is, where it lies, and both in one folder."""

import json
import pickle
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import make_pipeline

from deedsr.errors import DeeDSRError, UsageError
from deedsr.hub.model_folder import find_base, with_revision
from deedsr.hub.weights import base_digest
from deedsr.sampling.pipeline import DeeDSRPipeline
from jobs import cli
from pipelines.inference.options import UpscaleOptions
from pipelines.inference.upscaling import upscale
from pipelines.models import Learner, Model
from pipelines.storage import open_storage, publish
from pipelines.training.config import AdapterOptions

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `deedsr train adapter` writes: `model/`, whose base lay in a folder that is gone; it lies in `base/` now."""
    folder = tmp_path_factory.mktemp("trained")
    pipe = make_pipeline("kl")
    for part in ("vae", "unet", "scheduler"):
        getattr(pipe, part).save_pretrained(folder / "base" / part)
    for part in ("learner", "adapter"):
        getattr(pipe, part).save_pretrained(folder / "model" / part)
    description = {
        "format_version": 1,
        "base": str(folder / "gone"),
        "scale": 4,
        "sampling": {"num_inference_steps": 2},
    }
    description["base_digest"] = base_digest(folder / "base")
    (folder / "model" / "deedsr.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def other_base(trained, tmp_path_factory):
    """A base of the same geometry with other weights."""
    folder = tmp_path_factory.mktemp("other") / "base"
    shutil.copytree(trained / "base", folder)
    pipe = make_pipeline("kl")
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    pipe.unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def picture(photos, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("picture") / "small.png"
    Image.open(photos / "validation" / "Green-Maple.jpg").resize((24, 16), Image.Resampling.BOX).save(path)
    return str(path)


def test_a_model_takes_its_base_where_it_lies_and_no_other(trained, other_base, picture, tmp_path):
    model = str(trained / "model")
    given = lambda **more: UpscaleOptions(input=[picture], out=str(tmp_path / "out"), model=model, **more)
    assert not upscale(given(base=str(trained / "base")), progress=False).failed
    with pytest.raises(UsageError, match=r"base of .*/model is not where it says: .*gone.*--base"):
        upscale(given(), progress=False)
    with pytest.raises(UsageError, match=r"is not the base that .*/model was trained on"):
        upscale(given(base=str(other_base)), progress=False)


@pytest.mark.parametrize("command", ["upscale", "evaluate", "export"])
def test_every_command_that_loads_a_model_takes_its_base(
    command, trained, other_base, picture, small_dataset, tmp_path, capsys
):
    words = {
        "upscale": [picture, "--model", str(trained / "model")],
        "evaluate": ["--data", small_dataset, "--model", str(trained / "model"), "--limit", "1"],
        "export": [str(trained / "model")],
    }[command]
    assert cli.main([command, *words, "--base", str(other_base), "--out", str(tmp_path / "out")]) == 2
    assert "is not the base that" in capsys.readouterr().err


def test_a_base_in_s3_is_the_same_base(trained, picture, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = f"{bucket}/{tmp_path.name}/base"
    publish(trained / "base", uri)
    open_storage(uri).write("text_encoder/model.safetensors", b"nothing that is used")
    assert Model.find(str(trained / "model"), uri).load().scale == 4
    assert not [*tmp_path.rglob("text_encoder")]


def test_weights_that_are_not_loaded_and_notes_make_no_other_base(trained, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(trained / "base", copy)
    (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant beside the full weights")
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"_diffusers_version": "9.9"}))
    assert base_digest(copy) == base_digest(trained / "base")


def test_a_hub_id_is_kept_with_its_revision(trained, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--somebody--diffusion"
    shutil.copytree(trained / "base", cache / "snapshots" / REVISION)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(REVISION)
    name = with_revision("somebody/diffusion", find_base("somebody/diffusion"))
    assert name == f"somebody/diffusion@{REVISION}"
    (cache / "refs" / "main").write_text("f" * 40)  # somebody else's push
    assert find_base(name) == cache / "snapshots" / REVISION
    assert with_revision(name, find_base(name)) == name
    assert with_revision("tiny", find_base("tiny")) == "tiny"


def test_a_training_continues_with_its_base_wherever_that_lies_and_refuses_another(
    trained, other_base, small_dataset, tmp_path
):
    from pipelines.data.dataset import Dataset
    from pipelines.training.identity import weights_digest
    from pipelines.training.launch import train_adapter

    out = tmp_path / "out"
    learner = trained / "model" / "learner"
    before = AdapterOptions(data=small_dataset, learner=str(learner), base="/mnt/then/base", out=str(out))
    inputs = {"dataset": Dataset.open(small_dataset).digest, "learner": weights_digest(learner)}
    record = {"stage": "adapter", "config": asdict(before), "run_id": "0" * 32}

    def refusal(base, inputs) -> str:
        out.mkdir(exist_ok=True)
        (out / "training.json").write_text(json.dumps(record | {"inputs": inputs}))
        options = AdapterOptions(data=small_dataset, learner=str(learner), base=str(base), out=str(out))
        options.train.lr = 0.5  # what ends the call also where the base is right
        with pytest.raises(UsageError) as error:
            train_adapter(options, progress=False)
        return str(error.value)

    known = inputs | {"base": base_digest(trained / "base")}
    assert "base was" not in refusal(trained / "base", known)
    assert f"base was {known['base']}, is {base_digest(other_base)}" in refusal(other_base, known)
    # Of a record from before the digest was kept only the name is known.
    assert "base was '/mnt/then/base', is " in refusal(other_base, inputs)


@pytest.mark.parametrize("half", [False, True])
def test_an_exported_model_needs_nothing_else(half, trained, picture, tmp_path, capsys):
    lr = np.array(Image.open(picture))
    options = {"num_inference_steps": 2, "output_type": "np"}
    pipe = DeeDSRPipeline.from_pretrained(trained / "model", base=trained / "base")
    expected = pipe(lr, generator=torch.Generator().manual_seed(0), **options).images[0]
    words = ["export", str(trained / "model"), "--base", str(trained / "base"), "--out", str(tmp_path / "whole")]
    assert cli.main([*words, "--json", *(["--half"] if half else [])]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == str(tmp_path / "whole")
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    alone = DeeDSRPipeline.from_pretrained(tmp_path / "whole")
    assert alone.unet.dtype == torch.float32
    found = alone(lr, generator=torch.Generator().manual_seed(0), **options).images[0]
    assert np.abs(found - expected).max() <= (0.05 if half else 0)
    weights = lambda place: sum(path.stat().st_size for path in (place / "unet").glob("*.safetensors"))
    assert weights(tmp_path / "whole") < (0.7 if half else 1.1) * weights(trained / "base")
    assert cli.main(words) == 2
    assert "holds something already" in capsys.readouterr().err


def test_a_worker_names_its_machine_and_refuses_another_model(trained, tmp_path):
    """What unpickles a reference is a worker: it finds the folder by itself, and knows which model it is to be."""
    shutil.copytree(trained / "model", tmp_path / "model")
    description = json.loads((tmp_path / "model" / "deedsr.json").read_text())
    description["base"] = str(trained / "base")
    (tmp_path / "model" / "deedsr.json").write_text(json.dumps(description))
    model, learner = Model.find(tmp_path / "model"), Learner.find(tmp_path / "model")
    sent = pickle.dumps(model), pickle.dumps(learner)
    assert pickle.loads(sent[0]).load("cpu").scale == 4
    assert pickle.loads(sent[1]).digest == learner.digest
    description["scale"] = 2
    (tmp_path / "model" / "deedsr.json").write_text(json.dumps(description))
    with pytest.raises(DeeDSRError, match="is another one here than when the command was given"):
        pickle.loads(sent[0]).load("cpu")
    shutil.rmtree(tmp_path / "model")
    for found in map(pickle.loads, sent):
        with pytest.raises(UsageError, match="^on .*: there is no model folder .*Workers read models by themselves"):
            _ = found.path
