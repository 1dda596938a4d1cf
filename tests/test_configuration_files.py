"""What a file may hold: lists, mappings, and the configuration that a run has recorded."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from deedsr.dataset.recipe import builtin_recipes, load_recipe
from deedsr.errors import UsageError
from jobs import cli
from jobs.command import Command, Outcome
from jobs.options import CommandParser
from pipelines.training.config import AdapterOptions, TrainOptions

LEARNER = ["--data", "d", "--out", "o"]
ADAPTER = [*LEARNER, "--learner", "l"]


def read(command: str, words: list[str], content: dict[str, Any] | None = None, folder: Path | None = None) -> Any:
    """Options of a command from words and a file."""
    if content is not None and folder is not None:
        (folder / "c.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        words = [*words, "--config", str(folder / "c.yaml")]
    return cli.load(command)[1].read(words).options


def read_as_job(command: str, content: dict[str, Any]) -> Any:
    """Options of the command line that a job file's options become."""
    parser = cli.load(command)[1]
    words = [f"--{key}={word}" for key, several in parser.words_of(content).items() for word in several]
    return parser.read(words).options


@pytest.mark.parametrize(
    ("typed", "in_file", "statistics"),
    [
        (["4", "8"], [4, 8], [4, 8]),
        (["[4, 8]"], [4, 8], [4, 8]),
        (["4"], [4], [4]),
        (["[]"], [], []),
        (["null"], None, None),
    ],
)
def test_a_list_that_may_be_null_is_typed_or_stands_in_a_file(tmp_path, typed, in_file, statistics):
    assert read("train learner", [*LEARNER, "--model.statistics", *typed]).model.statistics == statistics
    content = {"data": "d", "out": "o", "model": {"statistics": in_file}}
    assert read("train learner", [], content, tmp_path).model.statistics == statistics
    assert read_as_job("train learner", content).model.statistics == statistics


def test_the_members_of_a_mapping_join_those_of_the_preset(tmp_path):
    expected = {"num_inference_steps": 20, "noise_guidance_share": 0.4, "eta": 0.5}
    preset = [*ADAPTER, "--preset", "tiny"]
    assert read("train adapter", [*preset, "--sampling.eta", "0.5"]).sampling == expected
    assert read("train adapter", [*preset, "--sampling", "{eta: 0.5}"]).sampling == expected
    content = {"preset": "tiny", "data": "d", "learner": "l", "out": "o", "sampling": {"eta": 0.5}}
    assert read("train adapter", [], content, tmp_path).sampling == expected
    assert read_as_job("train adapter", content).sampling == expected


def test_a_number_of_workers_is_a_number_and_a_range_is_text():
    workers = lambda typed: read("train learner", [*LEARNER, "--train.num_workers", typed]).train.num_workers
    assert [workers(typed) for typed in ("2", "1..4", "auto")] == [2, "1..4", "auto"]


def test_brackets_in_the_name_of_an_input_are_no_list():
    assert read("upscale", ["[ab]", "--out", "o"]).input == ["[ab]"]
    assert read("upscale", ["- a", "--out", "o"]).input == ["- a"]
    assert read_as_job("upscale", {"input": ["[ab]"], "out": "o"}).input == ["[ab]"]


@dataclasses.dataclass
class Section:
    step: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)


@dataclasses.dataclass
class Sections:
    first: Section = dataclasses.field(default_factory=Section)


def test_options_may_be_nested_at_any_depth(tmp_path):
    (tmp_path / "c.yaml").write_text("first: {step: {data: d, learner: l, train: {lr: 1e-3, seed: 2}}}")
    parser = CommandParser("try", Command(Sections, Outcome, ""))
    words = ["--config", str(tmp_path / "c.yaml"), "--first.step.train.seed", "3", "--first.step.out", "o"]
    train = TrainOptions(lr=1e-3, seed=3)
    assert parser.read(words).options == Sections(Section(AdapterOptions("d", "l", out="o", train=train)))
    (tmp_path / "c.yaml").write_text("first: {step: {train: {lr: fast}}}")
    with pytest.raises(UsageError, match=r"^--first\.step\.train\.lr \(in .*\) takes a number >0, got 'fast'"):
        parser.read(words)


def test_infinity_and_nan_are_no_numbers():
    for word in ("nan", "inf"):
        with pytest.raises(UsageError, match=f"--train.weight_decay takes a number ≥0, got '{word}'"):
            read("train learner", [*LEARNER, "--train.weight_decay", word])


@pytest.mark.parametrize("name", builtin_recipes())
def test_the_configuration_that_a_shards_run_records_is_read_again(tmp_path, name):
    options = read("shards", ["--source", "a", "--out", "b", "--recipe", name])
    recipe = load_recipe(name)
    recorded = dataclasses.asdict(options) | {"recipe": recipe.model_dump(mode="json")}
    for again in (read("shards", [], recorded, tmp_path), read_as_job("shards", recorded)):
        assert load_recipe(again.recipe).digest == recipe.digest
        assert dataclasses.replace(again, recipe=name) == options


def test_a_recipe_in_a_configuration_file_gives_what_differs_from_its_base(tmp_path):
    content = {"source": ["a"], "out": "b", "recipe": {"base": "light", "variants": 3}}
    recipe = load_recipe(read("shards", [], content, tmp_path).recipe)
    assert recipe == load_recipe("light").model_copy(update={"name": "inline", "variants": 3})
    with pytest.raises(
        UsageError, match=r"^recipe inline: unknown key varants; did you mean variants\? accepted here: "
    ):
        load_recipe({"varants": 3})


@pytest.mark.parametrize("command", ["train learner", "train adapter"])
@pytest.mark.parametrize("preset", ["paper", "fast", "tiny"])
def test_the_configuration_that_a_training_records_is_read_again(tmp_path, command, preset):
    words = LEARNER if command == "train learner" else ADAPTER
    options = read(command, [*words, "--preset", preset])
    recorded = dataclasses.asdict(options) | {"definitions": {"validation/psnr_y": "of Y"}}
    assert read(command, [], recorded, tmp_path) == options
