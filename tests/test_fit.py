"""`train learner` and `train adapter` on a real Ray cluster: results, continuation, lineage, a model that runs."""

import dataclasses
import hashlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from stored_things import restore_store

from deedsr.errors import DatasetNotCommitted, UsageError
from pipelines import tracking
from pipelines.models import Reference
from pipelines.training.config import (
    AdapterModelOptions,
    AdapterOptions,
    DiffusionOptions,
    LearnerModelOptions,
    LearnerOptions,
    TrainOptions,
)
from pipelines.training.launch import _located, train_adapter, train_learner


@pytest.fixture(scope="module")
def store(stored, tmp_path_factory) -> Iterator[str]:
    """The stored MLflow store, in force: that of the learner."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    restore_store(stored, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        yield f"sqlite:///{path}"


@pytest.fixture(scope="module")
def shards_run(store, small_dataset) -> str:
    """The run that made the dataset, as `deedsr shards` records it."""
    from pipelines.data.dataset import Dataset

    with tracking.start_run(
        "deedsr-shards", name="shards", config={}, tags={"deedsr.kind": "shards"}, system_metrics=False
    ) as run:
        run.log_dataset(Dataset.open(str(small_dataset)), context="shards")
    return run.id


@pytest.fixture(scope="module")
def begun(stored) -> dict:
    """`training.json` of a learner whose one worker was ended after seven steps."""
    return json.loads((stored.folder / "half_learner" / "training.json").read_text())


@pytest.fixture(scope="module")
def learner_options(stored, begun, tmp_path_factory) -> LearnerOptions:
    """Of that training, to go on with: two steps more, by two workers."""
    out = tmp_path_factory.mktemp("fit") / "learner"
    shutil.copytree(stored.folder / "half_learner", out)
    options = TypeAdapter(LearnerOptions).validate_python(begun["config"])
    train = dataclasses.replace(options.train, max_steps=9, log_every=1, num_workers=2, zero_stage=2)
    return dataclasses.replace(options, out=str(out), train=train)


@pytest.fixture(scope="module")
def learner(ray_cluster, store, learner_options):
    return train_learner(learner_options, progress=False)


@pytest.fixture(scope="module")
def adapter_options(learner, learner_options, shards_run, small_dataset, base, tmp_path_factory) -> AdapterOptions:
    return AdapterOptions(
        data=small_dataset,
        learner=learner_options.out,
        base=str(base),
        out=str(tmp_path_factory.mktemp("fit") / "adapter"),
        model=AdapterModelOptions(preset="tiny"),
        diffusion=DiffusionOptions(lr_crop=16),
        sampling={"num_inference_steps": 3},
        train=TrainOptions(
            global_batch_size=4, max_steps=3, checkpoint_every=2, log_every=1, ema_decay=0.9, num_workers=1
        ),
    )


@pytest.fixture(scope="module")
def adapter(adapter_options):
    before = _hash(Path(adapter_options.base))
    result = train_adapter(adapter_options, progress=False)
    assert _hash(Path(adapter_options.base)) == before
    return result


def _hash(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _steps(run_id: str) -> list[int]:
    client = tracking.connect(tracking.tracking_uri())
    return [metric.step for metric in client.get_metric_history(run_id, "loss")]


def test_a_training_continues_its_own_run_and_the_same_call_again_does_nothing(learner, learner_options, begun):
    assert learner.run_id == begun["run_id"]
    assert _steps(learner.run_id) == [5, 8, 9]  # every fifth of the first ones was logged
    assert train_learner(learner_options, progress=False) == learner


@pytest.mark.parametrize("stage", ["learner", "adapter"])
def test_the_result_names_run_checkpoint_and_progress(stage, request):
    result, options = request.getfixturevalue(stage), request.getfixturevalue(f"{stage}_options")
    steps = {"learner": 9, "adapter": 3}[stage]
    assert (result.step, result.samples_seen) == (steps, steps * options.train.global_batch_size)
    assert np.isfinite(result.loss)
    assert json.loads((Path(result.checkpoint) / "checkpoint.json").read_text())["step"] == steps
    assert (Path(options.out) / stage / "config.json").is_file()
    assert not list(Path(options.out).glob("_ray*"))


def test_what_was_chosen_for_cpus_at_the_first_start_is_recorded(adapter, adapter_options):
    recorded = json.loads((Path(adapter_options.out) / "training.json").read_text())["config"]["train"]
    assert (recorded["exact_sums"], recorded["tf32"]) == (True, False)


def test_the_run_knows_its_dataset_and_the_run_that_made_it(adapter, shards_run, small_dataset):
    from pipelines.data.dataset import Dataset

    run = tracking.connect(tracking.tracking_uri()).get_run(adapter.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["deedsr.parent.shards"] == shards_run
    assert run.data.tags["deedsr.dataset.digest"] == Dataset.open(str(small_dataset)).digest
    assert run.inputs.dataset_inputs
    assert run.data.params["train.global_batch_size"] == "4"


def test_a_metric_that_is_never_logged_is_refused_before_any_work(
    learner_options, adapter_options, small_dataset, tmp_path
):
    learner_options = dataclasses.replace(learner_options, data=small_dataset)

    def refuses(options, train, message, **changes):
        changed = dataclasses.replace(options, out=str(tmp_path / "out"), **changes)
        changed = dataclasses.replace(changed, train=dataclasses.replace(options.train, **train))
        with pytest.raises(UsageError, match=message):
            (train_learner if options is learner_options else train_adapter)(changed, progress=False)

    validated = {"validate_every": 1, "max_steps": 4}
    for train, message in (
        ({"best_metric": "los"}, "train.best_metric los is never logged; did you mean loss"),
        ({"best_metric": "validaton/loss"} | validated, "did you mean validation/loss"),
        ({"best_metric": "psnr"}, "is never logged; there are: data_wait_share, grad_norm, .*top5"),
        ({"best_metric": "validation/loss"}, "it needs a validation split and a train.validate_every"),
        ({"best_metric": "validation/loss", "validate_every": 5, "max_steps": 4}, "from 1 to train.max_steps"),
        ({"best_mode": "max"}, "train.best_mode max has no effect without train.best_metric"),
    ):
        refuses(learner_options, train, message)
    for train, message in (
        ({"best_metric": "top1"}, "train.best_metric top1 is never logged"),
        ({"best_metric": "loss_timestep/000-300"}, "did you mean loss_timestep/000-249"),
        ({"best_metric": "validation/psnr_y", "validation_pictures": 0} | validated, "pixels and train.validation_pic"),
    ):
        refuses(adapter_options, train, message)
    contrast = dataclasses.replace(learner_options.contrast, batch_block=1, batch_negatives=True)
    refuses(learner_options, {}, "contrast.batch_negatives has no negatives in", contrast=contrast)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train": {"lr": 0.5}}, "train.lr was 0.002, is 0.5"),
        ({"contrast": {"temperature": 0.5}}, "contrast.temperature"),
        ({"model": {"preset": "paper"}}, "model.preset"),
    ],
)
def test_another_configuration_on_the_same_out_is_refused_by_name(learner, learner_options, change, named):
    changed = dataclasses.replace(
        learner_options,
        **{part: dataclasses.replace(getattr(learner_options, part), **values) for part, values in change.items()},
    )
    with pytest.raises(UsageError, match=named):
        train_learner(changed, progress=False)


def test_a_training_of_the_other_stage_is_refused(learner, learner_options, adapter_options):
    with pytest.raises(UsageError, match="holds a training of the learner"):
        train_adapter(dataclasses.replace(adapter_options, out=learner_options.out), progress=False)


def test_checkpoints_of_another_run_or_of_an_unknown_one_are_not_taken_up(learner, learner_options, tmp_path):
    shutil.copytree(learner_options.out, tmp_path / "out")
    options = dataclasses.replace(learner_options, out=str(tmp_path / "out"))
    path = tmp_path / "out" / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_id": "other"}))
    with pytest.raises(UsageError, match=rf"step-\d+ is of MLflow run {learner.run_id}, .* of other"):
        train_learner(options, progress=False)
    path.unlink()
    with pytest.raises(UsageError, match="has checkpoints and no training.json"):
        train_learner(options, progress=False)


def test_missing_inputs_are_one_clear_error(learner_options, adapter_options, tmp_path):
    with pytest.raises(DatasetNotCommitted, match="manifest.json"):
        train_learner(dataclasses.replace(learner_options, data=str(tmp_path)), progress=False)
    with pytest.raises(UsageError, match="learner"):
        train_adapter(dataclasses.replace(adapter_options, learner=str(tmp_path)), progress=False)
    with pytest.raises(UsageError, match="unet"):
        train_adapter(dataclasses.replace(adapter_options, base=str(tmp_path)), progress=False)


def test_more_workers_than_the_machine_has_are_refused_instead_of_waited_for(ray_cluster, learner_options, tmp_path):
    train = dataclasses.replace(learner_options.train, global_batch_size=32, num_workers=8)
    with pytest.raises(UsageError, match="needs 8 CPUs"):
        train_learner(dataclasses.replace(learner_options, out=str(tmp_path), train=train), progress=False)


def test_the_adapter_is_a_model_that_enlarges_and_names_its_parents(adapter, adapter_options, learner, shards_run):
    from deedsr import DeeDSRPipeline

    tags = tracking.connect(tracking.tracking_uri()).get_run(adapter.run_id).data.tags
    assert tags["deedsr.parent.learner"] == learner.run_id
    assert tags["deedsr.parent.shards"] == shards_run
    pipe = DeeDSRPipeline.from_pretrained(adapter_options.out)
    pipe.set_progress_bar_config(disable=True)
    lr = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    assert pipe(lr).images[0].size == (80, 96)
    for config in Path(adapter_options.out).rglob("config.json"):
        assert "_name_or_path" not in json.loads(config.read_text())
    training = pipe.config["lineage"]["training"]
    assert (training["step"], training["samples_seen"], training["dataset"]["samples"]) == (3, 12, 88)
    assert training["dataset"]["digest"] in (Path(adapter_options.out) / "README.md").read_text()
    assert (Path(adapter_options.out) / "LICENSE").is_file()


def _versions(name: str) -> list:
    return sorted(
        tracking.connect(tracking.tracking_uri()).search_model_versions(f"name = '{name}'"),
        key=lambda v: int(v.version),
    )


def test_models_are_registered_with_their_lineage_and_serve_by_name(adapter, adapter_options, learner, shards_run):
    (version,) = [v for v in _versions("deedsr-adapter") if v.run_id == adapter.run_id]
    assert (version.run_id, version.source) == (adapter.run_id, adapter_options.out)
    expected = {
        "deedsr.kind": "adapter",
        "deedsr.step": "3",
        "deedsr.base": adapter_options.base,
        "deedsr.parent.learner": learner.run_id,
        "deedsr.parent.shards": shards_run,
    }
    assert expected.items() <= version.tags.items()
    learners = _versions("deedsr-learner")
    assert [v.run_id for v in learners[1:]] == [learner.run_id]  # the first one is the stored learner's
    # The same command again, its learner given by name, finds all done and registers nothing.
    by_name = dataclasses.replace(adapter_options, learner="models:/deedsr-learner/latest")
    assert train_adapter(by_name, progress=False) == adapter
    assert len([v for v in _versions("deedsr-adapter") if v.run_id == adapter.run_id]) == 1
    with pytest.raises(UsageError, match="no models:/deedsr-learner/99"):
        train_adapter(dataclasses.replace(adapter_options, learner="models:/deedsr-learner/99"), progress=False)


@pytest.mark.soak
def test_a_training_starts_from_given_weights_and_refuses_other_ones_in_the_middle(adapter, adapter_options, tmp_path):
    from safetensors.torch import load_file

    train = dataclasses.replace(adapter_options.train, lr=1e-12, max_steps=1, ema_decay=0.0)
    options = dataclasses.replace(adapter_options, init=adapter_options.out, out=str(tmp_path / "again"), train=train)
    train_adapter(options, progress=False)
    record = json.loads((tmp_path / "again" / "training.json").read_text())
    assert record["config"]["init"] == adapter_options.out
    before, after = (
        load_file(Path(folder) / "adapter" / "diffusion_pytorch_model.safetensors")
        for folder in (adapter_options.out, options.out)
    )
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-8) for name in before)
    with pytest.raises(UsageError, match="init was"):
        train_adapter(dataclasses.replace(options, init=None), progress=False)


def test_initial_weights_of_another_geometry_are_one_clear_error(learner, learner_options, adapter_options, tmp_path):
    new = {"init": "tiny", "out": str(tmp_path / "new")}
    with pytest.raises(UsageError, match=r"--init tiny .*adapter: .*residual_blocks"):
        train_adapter(dataclasses.replace(adapter_options, **new), progress=False)
    paper = LearnerModelOptions(preset="paper", norm_group=2)
    with pytest.raises(UsageError, match=r"--init tiny .*learner: .*widths"):
        train_learner(dataclasses.replace(learner_options, model=paper, **new), progress=False)
    with pytest.raises(UsageError, match="no model folder"):
        train_adapter(dataclasses.replace(adapter_options, **new | {"init": str(tmp_path)[1:]}), progress=False)


@pytest.mark.soak
def test_a_users_mistake_that_only_a_worker_meets_ends_the_run_instead_of_being_tried_again(
    learner, learner_options, tmp_path
):
    """Initial weights that the command has seen are gone when the workers look; failures are retried for ever."""
    init, out = tmp_path / "init", tmp_path / "out"
    shutil.copytree(Path(learner_options.out) / "learner", init / "learner")
    train = dataclasses.replace(learner_options.train, num_workers=1, max_failures=-1)

    def remove() -> None:
        while not (out / "training.json").exists():
            time.sleep(0.01)
        shutil.rmtree(init)

    threading.Thread(target=remove, daemon=True).start()
    with pytest.raises(UsageError, match="no model folder"):
        train_learner(dataclasses.replace(learner_options, init=str(init), out=str(out), train=train), progress=False)


@pytest.mark.soak
def test_a_killed_driver_is_continued_by_the_same_command_without_gap_or_doubled_step(store, learner_options, tmp_path):
    out = tmp_path / "learner"
    words = [
        sys.executable, "-m", "deedsr", "train", "learner", "--preset", "tiny", "--data", learner_options.data,
        "--out", str(out), "--model.norm_group", "2", "--contrast.batch_block", "4", "--contrast.queue_size", "24",
        "--train.global_batch_size", "8", "--train.max_steps", "60", "--train.checkpoint_every", "5",
        "--train.log_every", "1", "--json",
    ]  # fmt: skip
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not list(out.glob("checkpoints/*10/checkpoint.json")) and time.time() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.run(words, capture_output=True, text=True, timeout=250, check=True)
    result = json.loads(second.stdout)
    assert result["step"] == 60
    assert _steps(result["run_id"]) == list(range(1, 61))


def test_what_a_command_was_given_means_the_same_to_workers_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/learner", "home/init"):
        (tmp_path / folder).mkdir(parents=True)
    located = _located(AdapterOptions(data="~/shards", out="adapter"))
    assert (located.data, located.out) == (f"{tmp_path}/home/shards", f"{tmp_path}/adapter")
    names = {name: Reference.find(name).name for name in ("runs/learner", "~/init", "tiny")}
    assert names == {"runs/learner": f"{tmp_path}/runs/learner", "~/init": f"{tmp_path}/home/init", "tiny": "tiny"}
    assert _located(LearnerOptions(data="s3://bucket/a", out="file:///b")).data == "s3://bucket/a"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch can use no GPU here")
def test_a_training_takes_a_gpu_for_each_worker_and_none_when_told_so(learner, adapter_options, caplog):
    caplog.set_level(logging.INFO)
    assert train_adapter(adapter_options, progress=False).step == 3
    assert "x 1 GPU" in caplog.text
    assert "nccl" in caplog.text
    caplog.clear()
    train = dataclasses.replace(adapter_options.train, gpus_per_worker=0)
    without = dataclasses.replace(adapter_options, out=f"{adapter_options.out}-cpu", train=train)
    assert train_adapter(without, progress=False).step == 3
    assert "no GPU, gloo" in caplog.text
