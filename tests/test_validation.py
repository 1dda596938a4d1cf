"""Validation: fixed pairs, the same figures for any number of workers, and no trace of it in the training."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import training_process
from training_process import run_processes, variants

from pipelines.training.checks import logged_metrics
from pipelines.training.config import AdapterModelOptions, AdapterOptions, DiffusionOptions, TrainOptions
from pipelines.training.metrics import bucket_names
from pipelines.training.validation import fixed_rows, strip

# What rank 0 is told of validation goes into its --out.
SEEN = """
    def log_metrics(self, values, step):
        if "loss" in values:
            self.append([step, values["loss"]])
        elif dist.get_rank() == 0 and any(name.startswith("validation/") for name in values):
            with open(options.out + "/validation.jsonl", "a") as file:
                file.write(json.dumps(values | {"step": step}) + chr(10))

    def log_picture(self, name, picture, step):
        if dist.get_rank():
            return
        with open(options.out + "/pictures.jsonl", "a") as file:
            file.write(json.dumps([name, picture.shape, int(picture.astype("int64").sum()), step]) + chr(10))
"""


@pytest.fixture
def adapter_options(small_dataset, base) -> AdapterOptions:
    return AdapterOptions(
        data=str(small_dataset),
        learner="tiny",
        base=str(base),
        model=AdapterModelOptions(preset="tiny"),
        diffusion=DiffusionOptions(lr_crop=16),
        sampling={"num_inference_steps": 2},
        train=TrainOptions(lr=1e-3, global_batch_size=4, max_steps=4, checkpoint_every=4, log_every=1, ema_decay=0.9),
    )


def _lines(out: Path, name: str) -> list:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.fixture
def told(monkeypatch) -> None:
    worker = training_process.WORKER
    start, end = worker.index("    def log_metrics"), worker.index("    def logged")
    monkeypatch.setattr(training_process, "WORKER", worker[:start] + SEEN.lstrip(chr(10)) + worker[end:])


@pytest.fixture
def arms(learner_options, adapter_options, tmp_path, told):
    """A function that gives the options of the three trainings, by name, for a number of workers."""
    # Over two samples, as in the other tests, batch normalisation makes much of rounding.
    model = dataclasses.replace(learner_options.model, norm_group=4)
    learner = dataclasses.replace(learner_options, model=model)

    def make(name: str, **changes) -> dict:
        changes = {"max_steps": 4, "checkpoint_every": 4} | changes
        for kind in ("learner", "adapter", "zero3"):
            (tmp_path / f"{kind}-{name}").mkdir()
        return {
            "learner": variants(learner, tmp_path / f"learner-{name}", micro_batch_size=4, **changes),
            "adapter": variants(adapter_options, tmp_path / f"adapter-{name}", micro_batch_size=2, **changes),
            "zero3": variants(adapter_options, tmp_path / f"zero3-{name}", micro_batch_size=2, zero_stage=3, **changes),
        }

    return make


VALIDATED = {"validate_every": 2, "validation_samples": 5, "validation_pictures": 2}


def _trains_alike(off: dict, on: dict, workers: int) -> None:
    """Losses and weights are the same bit for bit."""
    # In processes of their own: ZeRO 3 leaves another `torch.nn.functional.linear` behind, which rounds otherwise.
    assert run_processes(workers, list(off.values())) == run_processes(workers, list(on.values()))
    for kind in off:
        weights = [
            next(Path(arm[kind].out).glob("checkpoints/*/trained.safetensors")).read_bytes() for arm in (off, on)
        ]
        assert weights[0] == weights[1]
        assert not (Path(off[kind].out) / "validation.jsonl").exists()
        assert (Path(on[kind].out) / "validation.jsonl").exists()


def test_validation_leaves_no_trace_in_the_training(arms):
    few = {"max_steps": 2, "checkpoint_every": 2}
    off, on = arms("off", **few), arms("on", **VALIDATED | {"validate_every": 1, "validation_pictures": 1}, **few)
    _trains_alike(*({kind: arm[kind] for kind in ("learner", "adapter")} for arm in (off, on)), workers=1)
    for kind in ("learner", "adapter"):  # what train.best_metric may name is what checkpoints hold
        [record] = Path(on[kind].out).glob("checkpoints/*/checkpoint.json")
        held, known = set(json.loads(record.read_text())["metrics"]), logged_metrics(on[kind], 1000, True, True)
        assert held <= known
        assert {name for name in known - held if "gpu" not in name} <= set(bucket_names(1000))  # of few samples


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_validation_tells_of_the_averaged_weights_and_leaves_no_trace_over_workers_and_in_zero_3(arms, tmp_path):
    off, on = arms("off"), arms("on", **VALIDATED)
    _trains_alike(off, on, workers=2)
    lines = {kind: _lines(tmp_path / f"{kind}-on", "validation.jsonl") for kind in on}
    assert all([line["step"] for line in told] == [2, 4] for told in lines.values())
    assert {"validation/top1", "validation/top5"} < lines["learner"][0].keys()
    first, second = lines["adapter"]
    buckets = [value for name, value in first.items() if name.startswith("validation/loss_timestep/")]
    assert len(buckets) == 4
    assert first["validation/loss"] == pytest.approx(np.mean(buckets), rel=1e-5)
    assert first["validation/loss"] != second["validation/loss"]
    assert first["validation/psnr_y_bicubic"] == second["validation/psnr_y_bicubic"] > 10
    pictures = _lines(tmp_path / "adapter-on", "pictures.jsonl")
    assert [step for *_, step in pictures] == [2, 2, 4, 4]
    assert all(shape == [128, 4 * 128, 3] for _, shape, _, _ in pictures)
    # ZeRO 3 validates the trained weights, the others their average: by step 4 they are far enough apart.
    assert lines["zero3"][1]["validation/loss"] != pytest.approx(second["validation/loss"], rel=1e-4)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_validation_says_the_same_for_any_number_of_workers(arms, tmp_path):
    for workers in (1, 2):
        run_processes(workers, list(arms(str(workers), **VALIDATED).values()))
    for kind in ("learner", "adapter", "zero3"):
        one, two = (_lines(tmp_path / f"{kind}-{workers}", "validation.jsonl") for workers in (1, 2))
        for first, second in zip(one, two, strict=True):
            for name in first.keys() - {"validation/seconds"}:
                np.testing.assert_allclose(second[name], first[name], rtol=2e-3, err_msg=f"{kind} {name}")


def test_the_pairs_are_fixed_by_their_keys_and_stay_when_others_join():
    keys = [f"k{i}" for i in range(50)]
    chosen = [keys[row] for row in fixed_rows(keys, 8)]
    assert chosen == [keys[::-1][row] for row in fixed_rows(keys[::-1], 8)]
    more = [f"new{i}" for i in range(10)] + keys
    again = [more[row] for row in fixed_rows(more, 8)]
    assert [key for key in again if key in keys] == chosen[: sum(key in keys for key in again)]
    assert fixed_rows(keys, 99) == fixed_rows(keys, 50)


def test_a_strip_shows_the_lr_in_squares_and_the_others_beside_it():
    lr = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    others = {"bicubic": np.zeros((80, 80, 3), np.uint8), "HR": np.full((80, 80, 3), 9, np.uint8)}
    picture = strip("photos/Yellow-Flower.jpg", lr, others)
    title, labels, columns = picture[:-98], picture[-98:-80], picture[-80:]
    assert columns.shape == (80, 240, 3)
    assert (columns[:40, :40] == lr[0, 0]).all()
    assert (columns[:, 160:] == 9).all()
    assert (title < 100).any()  # letters, and above each column
    assert [(labels[:, left : left + 80] < 100).any() for left in (0, 80, 160)] == [True] * 3
    assert not np.array_equal(strip("other.jpg", lr, others), picture)
