"""The learning rate by step, over continuations that are longer or shorter."""

import dataclasses
from dataclasses import asdict

import pytest

from deedsr.errors import UsageError
from pipelines.training.config import AdapterOptions, LearnerOptions, TrainOptions
from pipelines.training.identity import TrainingRecord
from pipelines.training.schedules import PRESETS, learning_rate, with_schedule


def test_learning_rate_warms_up_and_decays():
    train = TrainOptions(lr=1.0, schedule="cosine", warmup_steps=10, max_steps=110)
    rates = [learning_rate(train, step) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)


@pytest.mark.parametrize("recorded", ["before there was the option", "with the option"])
def test_a_run_that_is_made_longer_or_shorter_keeps_its_rates_and_says_where_they_end(recorded, caplog):
    train = TrainOptions(lr=1.0, schedule="cosine", warmup_steps=10, max_steps=110)
    began = asdict(with_schedule(AdapterOptions(train=train), None))
    assert began["train"]["schedule_steps"] == 110
    assert not caplog.records
    if recorded == "before there was the option":
        del began["train"]["schedule_steps"]
    before = [learning_rate(train, step) for step in range(110)]
    longer = with_schedule(AdapterOptions(train=dataclasses.replace(train, max_steps=200)), began).train
    assert [learning_rate(longer, step) for step in range(110)] == before
    assert [learning_rate(longer, step) for step in range(110, 200)] == pytest.approx([0.01] * 90)
    shorter = with_schedule(AdapterOptions(train=dataclasses.replace(train, max_steps=60)), began).train
    assert [learning_rate(shorter, step) for step in range(60)] == before[:60]
    beyond, within = [record.getMessage() for record in caplog.records]
    assert "train.max_steps 200 goes beyond the cosine schedule of 110 steps" in beyond
    assert "stays at its end, 0.01" in beyond
    assert "train.max_steps 60 ends within the cosine schedule of 110 steps" in within
    constant = AdapterOptions(train=TrainOptions(max_steps=10))
    assert with_schedule(dataclasses.replace(constant, train=TrainOptions(max_steps=20)), asdict(constant)).train == (
        TrainOptions(max_steps=20)
    )
    assert len(caplog.records) == 2


def longer_options(options: LearnerOptions, **changes) -> LearnerOptions:
    return dataclasses.replace(options, train=dataclasses.replace(options.train, max_steps=300, **changes))


def test_the_length_of_a_schedule_is_no_part_of_another_configuration_until_it_is_given(tmp_path):
    train = TrainOptions(schedule="cosine", max_steps=100)
    options = LearnerOptions(data="d", out=str(tmp_path), train=train)
    old = asdict(options)
    del old["train"]["schedule_steps"]
    for config in (old, asdict(with_schedule(options, None))):
        record = TrainingRecord("learner", config, {}, "run")
        longer = with_schedule(longer_options(options), config)
        record.refuse_differences(longer, {})
        other = with_schedule(longer_options(options, schedule_steps=300), config)
        with pytest.raises(UsageError, match="train.schedule_steps was 100, is 300"):
            record.refuse_differences(other, {})


@pytest.mark.parametrize("given", [{}, {"eta": 0.5}])
def test_a_training_from_a_model_recommends_its_sampling_but_for_what_is_given(given):
    from deedsr.hub.settings import SamplingSettings
    from pipelines.models import Model
    from pipelines.training.adapter_stage import AdapterStage
    from pipelines.training.config import AdapterModelOptions, AdapterOptions

    of_preset = PRESETS["adapter"]["tiny"]["sampling"]
    options = AdapterOptions(
        data="d", out="o", learner="tiny", base="tiny", init="tiny", model=AdapterModelOptions(preset="tiny"),
        sampling=of_preset | given,
    )  # fmt: skip
    recommended = Model.find("tiny").description.sampling
    assert SamplingSettings.of(AdapterStage(options, 4).sampling) == recommended.override(**given)
    assert AdapterStage(dataclasses.replace(options, init=None), 4).sampling == of_preset | given
