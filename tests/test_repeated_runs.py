"""A run of MLflow is made again from the configuration that it has recorded, and says how."""

import json
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from stored_things import restore_store

from jobs import cli
from pipelines import tracking
from pipelines.tracking.description import active_seconds, repeat_command
from pipelines.tracking.provenance import commit_tags, git_commit

ROOT = Path(__file__).parent.parent


@pytest.fixture
def things(stored, tmp_path, monkeypatch) -> Path:
    """Stored results of every command and their store, in the working directory."""
    for name in ("dataset", "sources", "base", "init", "learner", "model"):
        shutil.copytree(stored.folder / name, tmp_path / name)
    for name in ("recipe", "learner", "model"):
        shutil.copy(stored.folder / f"{name}.yaml", tmp_path)
    restore_store(stored, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def run(capsys, line: str) -> dict:
    capsys.readouterr()
    code = cli.main([*shlex.split(line)[1:], "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def stored_run(run_id: str):
    return MlflowClient(tracking.tracking_uri()).get_run(run_id)


def made_again(capsys, result: dict, out: str) -> dict:
    """The result of the line that a run shows."""
    line = repeat_command(stored_run(result["run_id"]))
    assert line in stored_run(result["run_id"]).data.tags["mlflow.note.content"]
    again = run(capsys, line.replace("--out NEW", f"--out {out}"))
    assert again["run_id"] != result["run_id"]
    return again


def test_an_evaluation_is_made_again_from_its_run_and_says_what_it_was(things, capsys):
    words = "--metrics psnr,ssim --limit 1 --steps 3 --border 2 --seed 5 --tag team=blue --note 'after the holidays'"
    first = run(capsys, f"deedsr evaluate --model model --data dataset --out first {words}")
    again = made_again(capsys, first, "again")
    assert again["metrics"] == first["metrics"]
    one, two = (json.loads((things / name / "results.json").read_text()) for name in ("first", "again"))
    assert two["samples"] == one["samples"]
    assert two["sampling"] == one["sampling"]
    data, name = stored_run(first["run_id"]).data, stored_run(first["run_id"]).info.run_name
    assert name.startswith("evaluation · dataset · ")
    assert all(word in name for word in ("steps=3", "seed=5", "model=model"))
    assert data.tags["team"] == "blue"
    assert data.tags["mlflow.source.name"] == "deedsr evaluate"
    assert data.tags["mlflow.source.type"] == "LOCAL"
    description = data.tags["mlflow.note.content"]
    psnr = first["metrics"]["model"]["psnr"]["mean"]
    adapter = data.tags["deedsr.parent.adapter"]
    experiment = stored_run(adapter).info.experiment_id
    for expected in ("after the holidays", f"model.psnr {psnr:.5g}", f"#/experiments/{experiment}/runs/{adapter}"):
        assert expected in description
    assert "deedsr.hosts" in data.tags


def test_a_name_that_is_chosen_is_the_runs_and_a_later_one_replaces_it(things, capsys):
    line = "deedsr evaluate --model model --data dataset --metrics psnr --limit 1 --steps 1 --out e --run-name"
    result = run(capsys, f"{line} mine")
    assert stored_run(result["run_id"]).info.run_name == "mine"
    (things / "e" / "results.json").unlink()
    assert run(capsys, f"{line} better")["run_id"] == result["run_id"]
    assert stored_run(result["run_id"]).info.run_name == "better"
    for wrong in ("novalue", "=x", "mlflow.user=me"):
        assert cli.main([*shlex.split(f"{line} x --tag {wrong}")[1:]]) == 2
        assert "--tag takes KEY=VALUE" in capsys.readouterr().err


def test_a_configuration_that_no_run_has_is_an_error_that_names_it(things, capsys):
    for place in ("runs:/0123/config.yaml", "runs:/"):
        assert cli.main(["evaluate", "--config", place, "--out", "e"]) == 2
        assert f"error: {place} is not in the MLflow store sqlite:///{things}/mlflow.db" in capsys.readouterr().err


@pytest.mark.soak
def test_shards_and_latents_are_made_again_from_their_runs(things, capsys, ray_cluster):
    shards = run(capsys, "deedsr shards --source sources --recipe recipe.yaml --out shards")
    assert made_again(capsys, shards, "shards2")["digest"] == shards["digest"]
    latents = run(capsys, "deedsr latents --data dataset --base base --learner learner --out latents")
    assert made_again(capsys, latents, "latents2")["digest"] == latents["digest"]


@pytest.mark.soak
def test_trainings_are_made_again_from_their_runs(things, capsys, ray_cluster):
    learner = run(capsys, "deedsr train learner --config learner.yaml --data dataset --out l --train.max_steps 2")
    made_again(capsys, learner, "l2")
    words = "--data dataset --learner l --base base --init null --out m --train.max_steps 2"
    adapter = run(capsys, f"deedsr train adapter --config model.yaml {words}")
    made_again(capsys, adapter, "m2")
    for one, two in (("l/learner", "l2/learner"), ("m/adapter", "m2/adapter")):
        weights = sorted(path.name for path in (things / one).glob("*.safetensors"))
        assert weights
        for name in weights:
            assert (things / one / name).read_bytes() == (things / two / name).read_bytes()
    name = stored_run(adapter["run_id"]).info.run_name
    assert name.startswith("adapter · tiny · dataset · ")
    assert stored_run(adapter["run_id"]).data.tags["deedsr.plan"]


def test_a_pause_is_no_part_of_the_time_that_a_run_took(things):
    options = {"name": "run", "config": {}, "system_metrics": False}
    first = tracking.start_run("deedsr-learner", **options)
    first.log_metrics({"loss": 1.0}, 1)
    first.flush()
    began = time.time()
    while time.time() - began < 3:  # the first process was killed here
        time.sleep(0.1)
    with tracking.start_run("deedsr-learner", run_id=first.id, **options):
        time.sleep(0.5)
    found = stored_run(first.id)
    assert 0.4 < active_seconds(found) < 3
    assert found.info.end_time - found.info.start_time > 3000


def test_an_experiment_opens_as_one_of_model_training(things):
    client = MlflowClient(tracking.tracking_uri())
    kind = "mlflow.experimentKind"
    assert kind not in client.get_experiment_by_name("deedsr-learner").tags  # of version 0.1.0
    for name in ("deedsr-learner", "of-my-own"):
        tags = {"deedsr.kind": "learner"}
        tracking.start_run(name, name="run", config={}, system_metrics=False, tags=tags).finish()
        assert client.get_experiment_by_name(name).tags[kind] == "custom_model_development"
    assert "Stage 1" in client.get_experiment_by_name("of-my-own").tags["mlflow.note.content"]


def test_the_commit_is_that_of_the_code_and_says_whether_it_was_changed(tmp_path, monkeypatch):
    code = tmp_path / "pipelines" / "tracking" / "provenance.py"
    code.parent.mkdir(parents=True)
    shutil.copy(ROOT / "pipelines" / "tracking" / "provenance.py", code)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_commit(tmp_path) is None
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_commit(tmp_path) == head
    code.write_text("changed")
    assert git_commit(tmp_path) == f"{head}-dirty"
    monkeypatch.setattr("pipelines.tracking.provenance.git_commit", lambda: None)  # an upload without .git
    monkeypatch.setenv("DEEDSR_GIT_COMMIT", f"{head}-dirty")
    assert commit_tags() == {"mlflow.source.git.commit": head, "mlflow.source.git.dirty": "true"}


def test_a_job_records_the_commit_of_its_working_directory(tmp_path):
    from jobs.job_file import load_job_files

    job = {"command": "shards", "options": {"source": ["s3://b/p"], "out": "s3://b/s"}, "mlflow": "nodes"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job | {"working_dir": "."}))
    assert "DEEDSR_GIT_COMMIT" not in load_job_files(tmp_path / "job.yaml")[0].ray_runtime_env()["env_vars"]
