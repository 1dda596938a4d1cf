"""What an earlier version wrote is read, continued and reused (tests/stored; CHANGELOG.md says what stays readable)."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from ray_head import free_ports
from stored_things import CONTINUED, TRAININGS, digests, losses, restore_store, running, samples_digest, where

import deedsr
from deedsr import DeeDSRPipeline
from jobs import cli
from jobs.job_file import load_job_files
from pipelines.data.dataset import Dataset
from pipelines.models import Learner, Model
from pipelines.shards import verify

LEVELS = 3  # of 255 that a pixel may differ by on another processor
# Relative, of a loss on another processor or with another torch. With the kernels for processors without AVX the
# curves here differ by 1e-5 after 20 steps; one activation on the other side of a ReLU may make a percent.
LOSS_TOLERANCE = 0.02


@pytest.fixture(scope="module")
def store(stored, tmp_path_factory):
    """The MLflow store as it was, in force."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    restore_store(stored, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        yield path


def run(capsys, *words: object) -> dict:
    """The JSON result of a command that succeeds."""
    capsys.readouterr()
    code = cli.main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


@pytest.mark.parametrize(("name", "samples", "replayed"), [("dataset", 16, 16), ("hr_from", 4, 4), ("latents", 16, 0)])
def test_a_dataset_is_whole_and_its_samples_are_the_same(stored, name, samples, replayed):
    """`replayed`: samples whose LR this version's degradation makes of the HR and the draws again, byte by byte."""
    result = verify(str(stored.folder / name), replay=replayed, progress=False)
    assert (result.problems, result.samples, result.replayed) == ([], samples, replayed)
    assert samples_digest(Dataset.open(str(stored.folder / name))) == stored.expected["samples"][name]


def test_every_digest_that_is_stored_keeps_its_definition(stored):
    assert digests(stored.folder) == stored.expected["digests"]


def test_the_same_sources_and_recipe_reuse_every_shard(stored, tmp_path, capsys):
    """By the records in `_state`; the new manifest and index are the old ones but for who wrote them."""
    shutil.copytree(stored.folder / "dataset", tmp_path / "dataset")
    shutil.copytree(stored.folder / "hr_from", tmp_path / "hr_from")
    words = ["--recipe", stored.folder / "recipe.yaml", "--out", tmp_path / "dataset", "--tracking", "false"]
    result = run(capsys, "shards", "--source", stored.folder / "sources", *words)
    before = Dataset.open(str(stored.folder / "dataset"))
    assert (result["written"], result["reused"]) == (0, len(before.manifest.shards))
    assert (result["digest"], result["rejected"]) == (before.digest, 1)
    after = Dataset.open(str(tmp_path / "dataset"))
    assert after.index().equals(before.index())
    assert after.manifest.source_digest == before.manifest.source_digest

    words = ["--recipe", "light", "--out", tmp_path / "hr_from", "--tracking", "false"]
    result = run(capsys, "shards", "--hr-from", tmp_path / "dataset", *words)
    before = Dataset.open(str(stored.folder / "hr_from"))
    assert (result["written"], result["reused"]) == (0, len(before.manifest.shards))
    assert result["digest"] == before.digest


# ---------------------------------------------------------------------------------------------------------------------
# Trainings


@pytest.fixture(scope="module")
def curves(stored, tmp_path_factory):
    """Losses of every training, by step; all run at once."""
    with running(stored.folder, tmp_path_factory.mktemp("trainings")) as groups:
        yield {name: losses(group) for name, group in groups.items()}


@pytest.mark.parametrize("name", [*TRAININGS, "new_learner", "new_adapter", "latents"])
def test_a_training_has_the_losses_that_it_had(stored, curves, name):
    """The half-done ones go on from their checkpoints, the others begin. To the last bit where torch, numpy and the
    processor are those that the losses were written with; elsewhere to LOSS_TOLERANCE."""
    expected = stored.expected["losses"][name]
    if where() == stored.expected["where"]:
        assert curves[name] == expected
        return
    assert [step for step, _ in curves[name]] == [step for step, _ in expected]
    assert curves[name] == [[step, pytest.approx(loss, rel=LOSS_TOLERANCE)] for step, loss in expected]


@pytest.mark.parametrize(("stage", "name"), [("learner", "learner"), ("adapter", "model")])
def test_a_finished_training_is_known_as_done(stored, capsys, stage, name):
    """By `training.json`: its configuration and the digests of dataset, learner, base and initial weights."""
    folder = stored.folder
    words = ["--config", folder / f"{name}.yaml", "--data", folder / "dataset", "--out", folder / name]
    if stage == "adapter":
        words += ["--learner", folder / "learner", "--base", folder / "base", "--init", folder / "init"]
    before = (folder / name / "training.json").read_bytes()
    result = run(capsys, "train", stage, *words)
    record = json.loads(before)
    assert (result["run_id"], result["step"]) == (record["run_id"], record["exported"])
    assert (folder / name / "training.json").read_bytes() == before


@pytest.mark.soak
def test_the_commands_continue_what_was_stored(stored, store, tmp_path, capsys, ray_cluster):
    """Through the driver: the same `--out`, the same MLflow run, no gap in its curve; latents made of the pixels."""
    from pipelines import tracking

    folder = tmp_path / "things"
    shutil.copytree(stored.folder, folder)
    of_adapter = ["--learner", folder / "learner", "--base", folder / "base", "--init", folder / "init"]
    for stage, name, more in (("learner", "half_learner", []), ("adapter", "half_adapter", of_adapter)):
        record = json.loads((folder / name / "training.json").read_text())
        begun = int(next((folder / name).glob("checkpoints/step-*")).name.removeprefix("step-"))
        config = folder / ("learner.yaml" if stage == "learner" else "model.yaml")
        words = ["--config", config, "--data", folder / "dataset", "--out", folder / name, *more]
        words += ["--train.max_steps", begun + CONTINUED, "--train.log_every", "1"]
        result = run(capsys, "train", stage, *words)
        assert (result["run_id"], result["step"]) == (record["run_id"], begun + CONTINUED)
        client = tracking.connect(tracking.tracking_uri())
        steps = [metric.step for metric in client.get_metric_history(record["run_id"], "loss")]
        assert steps[-CONTINUED:] == list(range(begun + 1, begun + CONTINUED + 1))
        assert steps == sorted(set(steps))
    words = ["--base", folder / "base", "--learner", folder / "learner", "--out", folder / "latents"]
    result = run(capsys, "latents", "--data", folder / "dataset", *words)
    assert (result["written"], result["digest"]) == (0, stored.expected["digests"]["digest of latents"])
    words = ["--config", folder / "model.yaml", "--data", folder / "latents", "--out", folder / "new", *of_adapter]
    assert run(capsys, "train", "adapter", *words)["step"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# Models and pictures


@pytest.mark.parametrize("name", ["model", "pipeline"])
def test_a_model_and_a_saved_pipeline_enlarge_a_picture_as_they_did(stored, name):
    """`model` is what `train adapter` wrote and names its base, `pipeline` what `save_pretrained` did."""
    pipe = DeeDSRPipeline.from_pretrained(stored.folder / name)
    pipe.set_progress_bar_config(disable=True)
    lr = np.asarray(Image.open(stored.folder / "pictures" / "maple.png"))
    got = np.asarray(pipe(lr, generator=torch.Generator().manual_seed(0)).images[0]).astype(int)
    expected = np.asarray(Image.open(stored.folder / "upscaled" / "maple.png")).astype(int)
    assert expected.std() > 20
    assert abs(got - expected).max() <= LEVELS


def test_a_registered_model_is_found(stored, store):
    assert Model.find("models:/deedsr-adapter/1").path == stored.folder / "model"
    assert Learner.find("models:/deedsr-learner/latest").path == stored.folder / "learner" / "learner"
    assert Model.find("models:/deedsr-adapter/latest").load("cpu").scale == 4


def test_an_upscaled_picture_is_reused(stored, store, tmp_path, capsys):
    if deedsr.__version__ != stored.version:
        pytest.skip("every version makes pictures anew: the mark in their EXIF holds it")
    shutil.copytree(stored.folder / "upscaled", tmp_path / "upscaled")
    before = (tmp_path / "upscaled" / "maple.png").read_bytes()
    words = ["--model", "models:/deedsr-adapter/1", "--out", tmp_path / "upscaled"]
    result = run(capsys, "upscale", stored.folder / "pictures", *words)
    assert (result["reused"], result["failed"]) == (1, [])
    assert (tmp_path / "upscaled" / "maple.png").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Job files


def test_job_files_still_mean_the_same_commands(stored, monkeypatch):
    for name in ("YOUR-BUCKET", "YOUR-MLFLOW-HOST"):
        monkeypatch.setenv(name.replace("-", "_"), name.lower())
    found = {}
    for path in sorted((stored.folder / "jobs").glob("*.yaml")):
        # Up to four workers were accepted then, and three of them refused by the command: the batch does not divide.
        path.write_text(path.read_text().replace("1..4", "1..2"))
        found[path.stem] = (
            load_job_files(path)[0].entrypoint.replace("your-bucket", "YOUR-BUCKET").replace("1..2", "1..4")
        )
    assert found == stored.expected["entrypoints"]


def test_a_job_file_with_every_key_is_accepted_by_submit(stored, capsys):
    """Up to the cluster, which is not there."""
    [port] = free_ports(1)
    path = stored.folder / "jobs" / "every_key.yaml"
    path.write_text(path.read_text().replace("1..4", "1..2"))
    assert cli.main(["submit", str(path), "--address", f"http://127.0.0.1:{port}"]) == 1
    assert "no Ray dashboard answers" in capsys.readouterr().err
