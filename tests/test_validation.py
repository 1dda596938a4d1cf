"""Validation: fixed pairs, the same figures for any number of workers, and no trace of it in the training."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import test_training
from test_training import base, learner_options, run_processes, variants  # noqa: F401

from pipelines.training.config import AdapterModelOptions, AdapterOptions, DiffusionOptions, TrainOptions
from pipelines.training.validation import fixed_rows, strip

# What rank 0 is told of validation goes into its --out.
SEEN = """
    def log_metrics(self, values, step):
        if "loss" in values:
            self.append([step, values["loss"]])
        elif dist.get_rank() == 0:
            with open(options.out + "/validation.jsonl", "a") as file:
                file.write(json.dumps(values | {"step": step}) + chr(10))

    def log_picture(self, name, picture, step):
        if dist.get_rank():
            return
        with open(options.out + "/pictures.jsonl", "a") as file:
            file.write(json.dumps([name, picture.shape, int(picture.astype("int64").sum()), step]) + chr(10))
"""


@pytest.fixture
def adapter_options(small_dataset, base) -> AdapterOptions:  # noqa: F811
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


def test_validation_leaves_no_trace_in_the_training_and_is_the_same_for_any_number_of_workers(
    learner_options,  # noqa: F811
    adapter_options,
    tmp_path,
    monkeypatch,
):
    worker = test_training.WORKER
    start = worker.index("    def log_metrics")
    end = worker.index("    def unsent")
    monkeypatch.setattr(test_training, "WORKER", worker[:start] + SEEN.lstrip(chr(10)) + worker[end:])
    steps = {"max_steps": 4, "checkpoint_every": 4}
    # Over two samples, as in the other tests, batch normalisation makes much of rounding.
    model = dataclasses.replace(learner_options.model, norm_group=4)
    calm = dataclasses.replace(learner_options, model=model)
    on = steps | {"validate_every": 2, "validation_samples": 5, "validation_pictures": 2}

    off = [
        variants(calm, tmp_path / "learner-off", micro_batch_size=4, **steps),
        variants(adapter_options, tmp_path / "adapter-off", micro_batch_size=2),
    ]
    for out in ("learner-1", "adapter-1", "adapter-zero3-1", "learner-2", "adapter-2", "adapter-zero3-2"):
        (tmp_path / out).mkdir()

    def with_validation(workers: int) -> list:
        return [
            variants(calm, tmp_path / f"learner-{workers}", micro_batch_size=4, **on),
            variants(adapter_options, tmp_path / f"adapter-{workers}", micro_batch_size=2, **on),
            variants(adapter_options, tmp_path / f"adapter-zero3-{workers}", micro_batch_size=2, zero_stage=3, **on),
        ]

    *without, learner, adapter, _ = run_processes(1, off + with_validation(1))
    run_processes(2, with_validation(2))
    assert [learner, adapter] == without  # bit for bit
    for kind in ("learner", "adapter"):
        weights = [next(f.glob("checkpoints/*/trained.safetensors")).read_bytes()
                   for f in (tmp_path / f"{kind}-off", tmp_path / f"{kind}-1")]  # fmt: skip
        assert weights[0] == weights[1]

    for kind in ("learner", "adapter", "adapter-zero3"):
        one, two = (_lines(tmp_path / f"{kind}-{workers}", "validation.jsonl") for workers in (1, 2))
        assert [line["step"] for line in one] == [2, 4]
        assert one[0]["validation/loss"] != one[1]["validation/loss"]
        for first, second in zip(one, two, strict=True):
            for name in first.keys() - {"validation/seconds"}:
                np.testing.assert_allclose(second[name], first[name], rtol=2e-3, err_msg=f"{kind} {name}")
    assert {"validation/top1", "validation/top5"} < _lines(tmp_path / "learner-1", "validation.jsonl")[0].keys()
    lines = _lines(tmp_path / "adapter-1", "validation.jsonl")
    buckets = [v for name, v in lines[0].items() if name.startswith("validation/loss_timestep/")]
    assert len(buckets) == 4
    assert lines[0]["validation/loss"] == pytest.approx(np.mean(buckets), rel=1e-5)
    assert lines[0]["validation/psnr_y_bicubic"] == lines[1]["validation/psnr_y_bicubic"] > 10
    pictures = _lines(tmp_path / "adapter-1", "pictures.jsonl")
    assert [step for *_, step in pictures] == [2, 2, 4, 4]
    assert all(shape == [128, 4 * 128, 3] for _, shape, _, _ in pictures)
    # ZeRO 3 validates the trained weights, the others their average: at step 2 both have moved.
    zero3 = _lines(tmp_path / "adapter-zero3-1", "validation.jsonl")
    assert zero3[1]["validation/loss"] != lines[1]["validation/loss"]


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
    picture = strip(lr, np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 9, np.uint8))
    assert picture.shape == (8, 24, 3)
    assert (picture[:4, :4] == lr[0, 0]).all()
    assert (picture[:, 16:] == 9).all()
