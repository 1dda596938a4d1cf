"""`deedsr chain`: places between the steps, what is skipped, and one MLflow run over those of the steps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command_results import differences
from mlflow import MlflowClient
from mlflow.entities import ViewType
from source_files import run as make_dataset
from stored_things import restore_store

from deedsr.dataset.recipe import load_recipe
from deedsr.errors import UsageError
from jobs import cli
from jobs.chain import STEPS, ChainOptions, check, steps
from jobs.job_file import load_job_files
from pipelines import tracking
from pipelines.models import Base, Learner
from pipelines.shards.encode import latents_job
from pipelines.shards.generate import finished, hr_job, join_job, source_job

ROOT = Path(__file__).parent.parent
NAMES = [step.name for step in STEPS]


def read(*words: str) -> ChainOptions:
    return cli.load("chain")[1].read(["--shards.source", "photos", "--preset", "tiny", *words]).options


def test_what_a_step_takes_from_those_before_it_and_where_it_writes_is_filled_in():
    own = {step.name: options for step, options in steps(read("--out", "s3://b/run/", "--base", "sd"))}
    assert list(own) == NAMES
    assert {name: options.out for name, options in own.items()} == {
        "shards": "s3://b/run/shards", "learner": "s3://b/run/learner", "latents": "s3://b/run/latents",
        "adapter": "s3://b/run/adapter", "evaluate": "s3://b/run/evaluation",
    }  # fmt: skip
    assert own["learner"].data == own["latents"].data == own["evaluate"].data == "s3://b/run/shards"
    assert own["latents"].learner == own["adapter"].learner == "s3://b/run/learner"
    assert own["latents"].base == own["adapter"].base == "sd"
    assert (own["adapter"].data, own["evaluate"].model) == ("s3://b/run/latents", "s3://b/run/adapter")
    assert [type(options) for options in own.values()] == [step.command.options for step in STEPS]
    assert own["learner"].train.max_steps == 400  # of the preset
    assert own["adapter"].diffusion.lr_crop == 32


def test_a_place_that_is_given_stays_and_the_steps_after_it_follow():
    places = ["--shards.out", "s3://b/shards", "--adapter.data", "s3://b/shards", "--latents.learner", "null"]
    own = {step.name: options for step, options in steps(read("--out", "run", *places))}
    assert own["shards"].out == own["learner"].data == own["adapter"].data == own["evaluate"].data == "s3://b/shards"
    assert own["latents"].learner is None
    assert own["adapter"].learner == "run/learner"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learner.train.lr", "-1"], "--learner.train.lr takes a number >0, got '-1'"),
        (["--adapter.train.num_workers", "3"], "adapter: train.global_batch_size 8 does not divide over 3"),
        (["--shards.hr_from", "other"], "shards: give one of --source, --hr-from and --join, not several"),
        (["--evaluate.metrics", "psnr,snr"], "evaluate: unknown metric 'snr'"),
        (["--shards.plan", "true"], "shards.plan is not for a chain, which makes shards"),
        (["--latents.tracking", "false"], "latents.tracking false: the steps of a chain are runs in MLflow"),
        (["--latents.out", "run/shards/"], "latents.out and shards.out are both run/shards/"),
        (["--learner.out", f"file://{Path.cwd()}/run"], f"learner.out and out are both file://{Path.cwd()}/run"),
        (["--learner.out", "gs://b/learner"], "gs://b/learner: locations are s3://bucket/prefix"),
        (["--learner.train.lrr", "1"], "unknown option --learner.train.lrr = 1; did you mean --learner.train.lr?"),
    ],
)
def test_what_a_step_would_refuse_is_refused_before_the_first_one(words, message):
    with pytest.raises(UsageError) as error:
        check(read("--out", "run", *words))
    assert str(error.value).startswith(message)


def test_as_a_job_it_has_places_that_stay_and_a_store(tmp_path):
    job = {"command": "chain", "options": {"out": "s3://b/run", "shards": {"source": ["s3://b/p"]}}, "mlflow": "nodes"}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    assert load_job_files(path)[0].entrypoint == "python -m deedsr chain --out=s3://b/run --shards.source=s3://b/p"
    path.write_text(yaml.safe_dump(job | {"options": job["options"] | {"learner": {"out": "learner"}}}))
    with pytest.raises(UsageError, match=r"options.learner.out is 'learner', relative to a working directory"):
        load_job_files(path)
    path.write_text(yaml.safe_dump(job | {"mlflow": None}))
    with pytest.raises(UsageError, match="has no MLFLOW_TRACKING_URI"):
        load_job_files(path)


# ---------------------------------------------------------------------------------------------------------------------
# What is skipped


@pytest.fixture
def things(stored, tmp_path, monkeypatch) -> Path:
    """What single commands made of every step but the evaluation, as the working directory, and a chain over it."""
    for name in ("dataset", "hr_from", "latents", "sources", "base", "init", "learner", "model"):
        shutil.copytree(stored.folder / name, tmp_path / name)
    shutil.copy(stored.folder / "recipe.yaml", tmp_path)
    restore_store(stored, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    own = {name: yaml.safe_load((stored.folder / f"{name}.yaml").read_text()) for name in ("learner", "model")}
    assert own["learner"].pop("preset") == own["model"].pop("preset") == "tiny"
    chain = {
        "preset": "tiny",
        "out": "chain",
        "base": "base",
        "shards": {"source": ["sources"], "recipe": "recipe.yaml", "out": "dataset"},
        "learner": own["learner"] | {"out": "learner"},
        "latents": {"out": "latents"},
        "adapter": own["model"] | {"data": "dataset", "init": "init", "out": "model"},
        "evaluate": {"metrics": "psnr,ssim", "limit": 1},
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    return tmp_path


def runs(folder: Path) -> dict[str, list]:
    """The runs of a store by kind."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found: dict[str, list] = {}
    for run in client.search_runs([e.experiment_id for e in client.search_experiments(ViewType.ALL)]):
        found.setdefault(run.data.tags["deedsr.kind"], []).append(run)
    return found


def test_what_is_done_is_skipped_and_the_rest_is_made_below_one_run(things, capsys, caplog):
    caplog.set_level("INFO")
    assert cli.main(["chain", "--config", "chain.yaml", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    absent = ("niqe is missing",)  # which needs larger pictures
    assert [line for line in differences("chain", first) if not line.endswith(absent)] == []
    assert first["skipped"] == NAMES[:-1]
    assert "chain: learner skipped: learner is done, of the same inputs and options" in caplog.text
    made = runs(things)
    [parent], [evaluation] = made["chain"], made["evaluation"]
    assert (parent.info.run_id, parent.info.status) == (first["run_id"], "FINISHED")
    assert evaluation.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.params["adapter.learner"] == "learner"
    assert parent.data.metrics["model.psnr"] == pytest.approx(first["evaluate"]["metrics"]["model"]["psnr"]["mean"])
    assert parent.data.tags["deedsr.dataset.digest"] == first["shards"]["digest"]
    assert "mlflow.parentRunId" not in made["learner"][0].data.tags  # of a single command

    assert cli.main(["chain", "--config", "chain.yaml", "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second == first | {"skipped": NAMES}
    again = runs(things)
    assert {kind: len(found) for kind, found in again.items()} == {kind: len(found) for kind, found in made.items()}
    assert again["chain"][0].info.end_time == parent.info.end_time  # nothing was done, nothing is written

    MlflowClient(f"sqlite:///{things}/mlflow.db").update_run(parent.info.run_id, "KILLED")  # after its last step
    assert cli.main(["chain", "--config", "chain.yaml"]) == 0
    [ended] = runs(things)["chain"]
    assert (ended.info.run_id, ended.info.status) == (first["run_id"], "FINISHED")


def test_a_step_of_another_configuration_is_refused_as_its_command_does_and_nothing_is_begun(things, capsys):
    assert cli.main(["chain", "--config", "chain.yaml", "--learner.train.lr", "0.5"]) == 2
    assert "learner holds a training of another configuration: train.lr was 0.002, is 0.5" in capsys.readouterr().err
    assert "chain" not in runs(things)


def test_an_evaluation_without_pairs_is_refused_before_the_trainings(things, capsys):
    (things / "learner" / "training.json").unlink()
    recipe = yaml.safe_load((things / "recipe.yaml").read_text())
    recipe["split"] = {"validation_patterns": ["nothing"]}
    (things / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    changed = load_recipe("recipe.yaml")
    make_dataset(["sources"], "other", changed)
    assert cli.main(["chain", "--config", "chain.yaml", "--shards.out", "other"]) == 2
    error = capsys.readouterr().err
    assert "other has no validation split" in error
    assert "or give evaluate.split train" in error


def test_shards_are_done_while_sources_recipe_and_tars_are_the_same(things):
    recipe = load_recipe("recipe.yaml")
    job = lambda out="dataset", **changes: source_job(["sources"], out, recipe.model_copy(update=changes))
    done = finished(job())
    assert (done.written, done.reused, done.validation) == (0, done.shards, done.samples // done.shards)
    assert done.digest == json.loads(Path("dataset/manifest.json").read_text())["digest"]
    assert finished(job("nothing")) is None
    assert finished(job("latents")) is None
    assert finished(job(seed=1)) is None
    assert finished(job(duplicates="reject")) is None
    [photo] = Path("sources/train").glob("Bamboo.jpg")
    shutil.copy2(photo, "sources/train/another.jpg")
    assert finished(job()) is None
    Path("sources/train/another.jpg").unlink()
    assert finished(job()) == done
    os.utime(photo)
    assert finished(job()) is None


def test_shards_with_a_tar_too_few_are_not_done(things):
    next(Path("dataset").glob("train-*.tar")).unlink()
    assert finished(source_job(["sources"], "dataset", load_recipe("recipe.yaml"))) is None


def test_shards_of_another_dataset_are_done_while_that_is_the_same(things):
    light = load_recipe("light")
    assert finished(hr_job("dataset", "hr_from", light)).reused == 4
    assert finished(hr_job("dataset", "hr_from", load_recipe("heavy"))) is None
    assert finished(source_job(["sources"], "dataset", light)) is None
    assert finished(source_job(["sources"], "hr_from", load_recipe("recipe.yaml"))) is None
    assert finished(join_job("hr_from", "latents")) is None
    with pytest.raises(UsageError, match="choose another"):
        hr_job("dataset", "dataset", light)
    with pytest.raises(UsageError, match="choose another"):
        join_job("hr_from", "dataset")


def test_latents_are_done_while_pixels_and_networks_are_the_same(things):
    base, learner = Base.find("base"), Learner.find("learner")
    given = ("dataset", base, learner, "latents")
    done = finished(latents_job(*given))
    assert (done.written, done.reused) == (0, done.shards)
    assert finished(latents_job(*given, precision="bf16")) is None
    assert finished(latents_job("dataset", base, None, "latents")) is None
    assert finished(latents_job("dataset", Base.find("tiny"), learner, "latents")) is None
    with pytest.raises(UsageError, match="choose another"):
        latents_job("dataset", base, learner, "dataset")
    config = Path("learner/learner/config.json")
    config.write_text(config.read_text().replace("}", ', "more": 1}'))
    assert finished(latents_job("dataset", base, Learner.find("learner"), "latents")) is None


# ---------------------------------------------------------------------------------------------------------------------
# Runs below a run


def test_a_run_that_begins_within_is_a_child_of_a_parent_that_begins_with_the_first(things):
    begun = []

    def parent() -> str:
        if not begun:
            begun.append(tracking.start_run("above", name="a", config={}, system_metrics=False).id)
        return begun[0]

    def start(**options) -> str:
        return tracking.start_run("below", name="b", config={}, system_metrics=False, **options).id

    client = MlflowClient(tracking.tracking_uri())
    above = lambda run_id: client.get_run(run_id).data.tags.get("mlflow.parentRunId")
    alone = start()
    with tracking.children_of(parent):
        assert begun == []
        children = [start(), start(run_id=alone)]
    assert [above(run_id) for run_id in children] == begun * 2
    assert above(begun[0]) is None
    assert above(start()) is None


# ---------------------------------------------------------------------------------------------------------------------
# The whole chain


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_chain_that_is_killed_in_the_learner_continues_and_ends_as_one_run_with_five_children(
    photos, small_recipe, tmp_path
):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe.model_dump(mode="json")))
    train = {"validate_every": 0, "log_every": 1, "num_workers": 1}
    chain = {
        "preset": "tiny",
        "out": str(tmp_path / "chain"),
        "shards": {"source": [str(photos)], "recipe": str(tmp_path / "recipe.yaml")},
        "learner": {"train": train | {"max_steps": 24, "checkpoint_every": 6, "global_batch_size": 32}},
        "adapter": {"train": train | {"max_steps": 4, "checkpoint_every": 2}},
        "evaluate": {"metrics": "psnr,ssim,niqe", "limit": 2, "steps": 2},
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    words = [sys.executable, "-m", "deedsr", "chain", "--config", str(tmp_path / "chain.yaml"), "--json"]
    checkpoints = tmp_path / "chain" / "learner" / "checkpoints"

    def ended_by(number: int) -> str:
        """Ends the chain in the middle of the learner, after another checkpoint; returns its log."""
        newest = lambda: sorted(checkpoints.glob("step-*/checkpoint.json"))[-1:]
        before = newest()
        with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as chain:
            deadline = time.monotonic() + 1200
            while newest() == before and chain.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            chain.send_signal(number)
            log = chain.stderr.read()
        assert newest() != before, log
        return log

    def states() -> dict[str, list[str]]:
        return {kind: [run.info.status for run in found] for kind, found in runs(tmp_path).items()}

    ended_by(signal.SIGKILL)
    assert states() == {"chain": ["RUNNING"], "shards": ["FINISHED"], "learner": ["RUNNING"]}
    close = [sys.executable, "-m", "deedsr", "runs", "close-stale", "--older", "0s"]
    subprocess.run(close, env=environment, check=True)
    assert states() == {"chain": ["KILLED"], "shards": ["FINISHED"], "learner": ["KILLED"]}

    log = ended_by(signal.SIGTERM)
    assert "chain: shards skipped" in log
    assert states() == {"chain": ["KILLED"], "shards": ["FINISHED"], "learner": ["KILLED"]}

    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert differences("chain", result) == []
    assert (result["skipped"], result["learner"]["step"], result["adapter"]["step"]) == (["shards"], 24, 4)
    found = runs(tmp_path)
    assert states() == dict.fromkeys(("chain", "shards", "learner", "latents", "adapter", "evaluation"), ["FINISHED"])
    [parent] = found.pop("chain")
    assert {run.data.tags["mlflow.parentRunId"] for [run] in found.values()} == {parent.info.run_id}

    again = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["skipped"] == NAMES
    assert {kind: len(ids) for kind, ids in runs(tmp_path).items()} == {"chain": 1} | dict.fromkeys(found, 1)
