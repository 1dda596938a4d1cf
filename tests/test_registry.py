"""The trained model in MLflow's registry: registered once, found by name, refused when its weights are others."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deedsr.errors import UsageError
from pipelines import tracking
from pipelines.models import Learner, Model
from pipelines.storage import open_storage, publish
from pipelines.tracking.registry import log_evaluation, register
from pipelines.training.config import LearnerOptions, check

TINY = Path(str(files("deedsr") / "assets" / "tiny"))


@pytest.fixture
def run(new_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path))
    with tracking.start_run("deedsr-adapter", name="adapter", config={}, system_metrics=False) as run:
        yield run


@pytest.fixture
def model(run, tmp_path) -> Path:
    """What `train adapter` leaves."""
    folder = tmp_path / "adapter-out"
    for part in ("adapter", "learner"):
        shutil.copytree(TINY / part, folder / part)
    (folder / "deedsr.json").write_text(json.dumps({"format_version": 1, "base": "tiny", "scale": 4}))
    (folder / "training.json").write_text(json.dumps({"run_id": run.id}))
    (folder / "checkpoints").mkdir()
    return folder


def _other_weights(model: Path) -> None:
    weights = next((model / "adapter").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def test_a_model_is_registered_once_with_its_lineage_and_found_by_version_latest_and_alias(run, model):
    out = open_storage(str(model))
    assert register(run, "sr", out, {"deedsr.step": "7", "deedsr.base": None}) == "1"
    assert register(run, "sr", out, {"deedsr.step": "7"}) == "1"
    client = MlflowClient(run.tracking_uri)
    (version,) = client.search_model_versions("name = 'sr'")
    assert version.run_id == run.id
    assert version.tags["deedsr.step"] == "7"
    assert "deedsr.base" not in version.tags
    client.set_registered_model_alias("sr", "best", "1")
    for name in ("models:/sr/1", "models:/sr/latest", "models:/sr@best"):
        assert Model.find(name).path == model
        assert Model.find(name).name == str(model)
    assert Learner.find("models:/sr/1").path == model / "learner"
    assert Model.find("models:/sr/1").run_id == run.id
    assert Model.find("models:/sr@best").load().scale == 4


def test_other_weights_are_a_new_version_and_the_old_one_says_that_its_own_are_gone(run, model):
    out = open_storage(str(model))
    register(run, "sr", out, {})
    _other_weights(model)
    with pytest.raises(UsageError, match=r"models:/sr/1 are gone: a later training wrote others to .*adapter-out"):
        Model.find("models:/sr/1")
    assert register(run, "sr", out, {}) == "2"
    assert Model.find("models:/sr/2").path == model


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("models:/sr/9", "no models:/sr/9 .*versions 1"),
        ("models:/sr@best", "no models:/sr@best"),
        ("models:/other/1", "no models:/other/1 .*models sr"),
        ("models:/other/latest", "no models:/other/latest"),
        ("models:/sr", "models:/NAME/VERSION"),
        ("models:sr/1", "models:/NAME/VERSION"),
    ],
)
def test_an_unknown_name_is_one_clear_error_that_says_what_there_is(run, model, name, named):
    register(run, "sr", open_storage(str(model)), {})
    with pytest.raises(UsageError, match=named):
        Model.find(name)


def test_a_store_that_is_not_there_is_named_and_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(UsageError, match="no MLflow store at .*none.db"):
        Model.find("models:/sr/1")
    assert not list(tmp_path.iterdir())


def test_weights_in_a_bucket_stay_there(run, model, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    publish(model, f"{bucket}/registered")
    register(run, "sr", open_storage(f"{bucket}/registered"), {})
    (version,) = MlflowClient(run.tracking_uri).search_model_versions("name = 'sr'")
    assert version.source == f"{bucket}/registered"
    assert not MlflowClient(run.tracking_uri).list_artifacts(run.id, "model")
    assert (Model.find("models:/sr/1").path / "adapter" / "config.json").is_file()
    assert Model.find("models:/sr/1").name == f"{bucket}/registered"


def test_a_name_with_quotes_is_registered_and_found_and_an_impossible_one_is_refused_before_the_work(run, model):
    out = open_storage(str(model))
    for name in ("it's", 'the "best"', "it's' or name != '"):
        assert register(run, name, out, {}) == "1"
        assert register(run, name, out, {}) == "1"
        assert Model.find(f"models:/{name}/latest").name == str(model)
    for name in ("a/b", "a:b", "", " ", 'it\'s "it"'):
        with pytest.raises(UsageError, match="register_as must be a name"):
            check(LearnerOptions(register_as=name))
    with pytest.raises(UsageError, match="quotes of both kinds"):
        Model.find('models:/it\'s "it"/latest')


def evaluation(model: Path, run, psnr: float, digest: str = "d" * 64, **changed) -> str:
    """An evaluation of the model in a folder; returns the version that `best` is."""
    results = {
        "metrics": {"model": {"psnr": {"mean": psnr}, "niqe": {"mean": None}}},
        "dataset": {"digest": digest, "split": "validation"},
        "samples": [{"key": "a"}, {"key": "b"}],
        "sampling": {"num_inference_steps": 20},
        "seed": 0,
        "precision": "fp32",
        "definitions": {"psnr": "of Y"},
    } | changed
    with tracking.start_run("deedsr-evaluation", name="e", config={}, system_metrics=False) as evaluated:
        log_evaluation(evaluated, run.id, model, results)
    aliases = MlflowClient(run.tracking_uri).get_registered_model("sr").aliases
    return str(aliases.get("best"))


def test_an_evaluation_stands_on_the_version_it_measured_and_best_moves_among_equal_ones_alone(run, model, caplog):
    caplog.set_level("INFO")
    out, client = open_storage(str(model)), MlflowClient(run.tracking_uri)
    register(run, "sr", out, {"deedsr.kind": "adapter"})
    assert evaluation(model, run, 24.0) == "1"
    _other_weights(model)
    register(run, "sr", out, {"deedsr.kind": "adapter"})
    assert evaluation(model, run, 25.0) == "2"
    one, two = (client.get_model_version("sr", version) for version in ("1", "2"))
    assert (one.tags["deedsr.psnr"], two.tags["deedsr.psnr"]) == ("24", "25")
    assert "2 samples of the validation split of dataset dddddddddddd: psnr 25" in two.description
    assert "version 2: psnr 25, the best of 2" in client.get_registered_model("sr").description

    _other_weights(model)  # those of version 1 again
    other = {"sampling": {"num_inference_steps": 50}}
    for changed in (
        {"digest": "e" * 64},
        {"seed": 1},
        {"samples": [{"key": "a"}]},
        other,
        {"definitions": {"psnr": "of RGB"}},
    ):
        assert evaluation(model, run, 40.0, **changed) == "2", changed
    assert "models:/sr@best stays version 2, which was chosen by psnr on 2 samples" in caplog.text
    as_before = {"num_inference_steps": 20, "temperature": 1.0}  # a setting of which earlier evaluations say nothing
    assert evaluation(model, run, 25.5, sampling=as_before) == "1"
    client.set_registered_model_alias("sr", "best", "2")  # by hand
    client.delete_registered_model_tag("sr", "deedsr.best")
    assert evaluation(model, run, 26.0) == "2"


def test_mlflows_own_pages_lead_from_an_evaluation_to_the_training(run, model):
    register(run, "sr", open_storage(str(model)), {"deedsr.kind": "adapter", "deedsr.step": "7"})
    evaluation(model, run, 24.0)
    client = MlflowClient(run.tracking_uri)
    version = client.get_model_version("sr", "1")
    (made,) = client.get_run(run.id).outputs.model_outputs
    assert (made.model_id, made.step) == (version.tags["deedsr.logged_model"], 7)
    experiment = client.get_experiment_by_name("deedsr-evaluation").experiment_id
    (evaluated,) = client.search_runs([experiment])
    evaluated = client.get_run(evaluated.info.run_id)
    assert [given.model_id for given in evaluated.inputs.model_inputs] == [made.model_id]
    assert client.get_logged_model(made.model_id).source_run_id == run.id
