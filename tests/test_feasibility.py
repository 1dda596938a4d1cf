"""Data from which a learner can learn nothing is refused before anything starts, settings without effect are named."""

import dataclasses

import pytest
from source_files import run

from deedsr.dataset.recipe import Recipe
from deedsr.errors import UsageError
from pipelines.data.dataset import Dataset
from pipelines.training.checks import check_learner_data, warn_of_idle
from pipelines.training.config import ContrastOptions, LearnerModelOptions, LearnerOptions, TrainOptions
from pipelines.training.launch import train_learner


@pytest.fixture
def made(one_crop_recipe, pictures, tmp_path):
    """A function that makes a dataset of a number of photographs, by a recipe with some changes."""

    def make(photographs: int, **changes) -> str:
        (tmp_path / "photos").mkdir()
        for name in sorted(pictures)[:photographs]:
            (tmp_path / "photos" / name).write_bytes(pictures[name])
        fields = one_crop_recipe.model_dump(mode="json")
        fields["crop"] |= changes.pop("crop", {})
        recipe = Recipe.model_validate(fields | changes)
        run([tmp_path / "photos"], tmp_path / "data", recipe)
        return str(tmp_path / "data")

    return make


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """A function that asks for a training and wants an error that matches."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")

    def ask(data: str, match: str, validate_every: int = 0, **contrast) -> None:
        options = LearnerOptions(
            data=data, out=str(tmp_path / "out"), register_as=None,
            model=LearnerModelOptions(preset="tiny", norm_group=2),
            contrast=ContrastOptions(queue_size=24, batch_block=4, **contrast),
            train=TrainOptions(global_batch_size=8, max_steps=1, num_workers=1, validate_every=validate_every),
        )  # fmt: skip
        with pytest.raises(UsageError, match=match):
            train_learner(options, progress=False)
        assert not (tmp_path / "out").exists()

    return ask


def test_a_training_that_wants_to_validate_says_how_to_have_a_split_for_it(made, refused, caplog):
    data = made(1)
    caplog.clear()
    refused(data, "come from one photograph", validate_every=1)
    assert f"{data} has no validation split: split.validation_patterns ('nothing') of recipe small" in caplog.text
    assert "training goes on without validation" in caplog.text
    caplog.clear()
    refused(data, "come from one photograph")
    assert "validation split" not in caplog.text


def test_one_photograph_has_negatives_only_in_the_block(made, refused):
    data = made(1, variants=4)
    refused(data, "come from one photograph, .* add photographs, or .*contrast.batch_negatives true")
    options = LearnerOptions(data=data, contrast=ContrastOptions(batch_negatives=True))
    check_learner_data(options, Dataset.open(data))


def test_samples_that_all_share_one_degradation_are_no_negatives_of_each_other(made, refused):
    data = made(3, distinct_degradations=1)
    for batch_negatives in (False, True):
        refused(data, "share one degradation, .* distinct_degradations", batch_negatives=batch_negatives)


def test_lr_images_without_equal_quadrants_are_refused(made, refused):
    refused(made(2, crop={"size": 68}), "have 17 px a side, .* multiple of 8")


def test_settings_without_an_effect_in_so_short_a_training_are_warned_of(small_dataset, caplog):
    dataset = Dataset.open(small_dataset)

    def warned(data: Dataset = dataset, **train) -> str:
        caplog.clear()
        warn_of_idle(LearnerOptions(train=TrainOptions(**{"max_steps": 10} | train)), data)
        return caplog.text

    assert warned() == warned(validate_every=10, warmup_steps=9) == ""
    assert "no validation: train.validate_every is 11 and train.max_steps 10" in warned(validate_every=11)
    assert "never leaves its warm-up: train.warmup_steps is 10 and train.max_steps 10" in warned(warmup_steps=10)
    without = dataclasses.replace(dataset)
    vars(without)["_samples"] = dataset.index("train")  # as read from a dataset whose recipe leaves none
    assert "has no validation split" in warned(without, validate_every=1)
