"""Claims on `deedsr inspect --against`: what regenerating changed is counted exactly, shown, and in MLflow."""

import json
from pathlib import Path

import numpy as np
import pytest
from browser import Loads
from mlflow import MlflowClient
from source_files import run

from deedsr.dataset.recipe import Recipe
from jobs import cli
from pipelines import tracking
from pipelines.data.dataset import Dataset
from pipelines.reports.difference import inspect_against


def changed(recipe: Recipe, **parts) -> Recipe:
    fields = recipe.model_dump(mode="json")
    for name, value in parts.items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    return Recipe.model_validate(fields)


@pytest.fixture(scope="module")
def made(pictures, one_crop_recipe, tmp_path_factory):
    """A function that makes a dataset of named pictures: {name: name of the picture whose content it has}."""
    folder = tmp_path_factory.mktemp("difference")

    def make(name: str, contents: dict[str, str], **parts) -> str:
        (folder / f"{name}-photos").mkdir()
        for path, picture in contents.items():
            (folder / f"{name}-photos" / path).write_bytes(pictures[picture])
        recipe = changed(one_crop_recipe, variants=2, **parts)
        run([folder / f"{name}-photos"], folder / name, recipe)
        return str(folder / name)

    return make


@pytest.fixture(scope="module")
def old(made, pictures) -> str:
    return made("old", contents(pictures))


@pytest.fixture(scope="module")
def new(made, pictures) -> str:
    """0.jpg is gone, 1.jpg has another content, 2.jpg is added, and JPEG is stronger."""
    first, second = jpegs(pictures)[:2]
    quality = {"degradation": {"jpeg1_quality": [30, 50]}}
    return made("new", {"1.jpg": first, "2.jpg": second, "x.png": png(pictures)}, **quality)


def contents(pictures: dict[str, bytes]) -> dict[str, str]:
    return {"0.jpg": jpegs(pictures)[0], "1.jpg": jpegs(pictures)[1], "x.png": png(pictures)}


def jpegs(pictures: dict[str, bytes]) -> list[str]:
    return sorted(name for name in pictures if name.endswith(".jpg"))


def png(pictures: dict[str, bytes]) -> str:
    return next(name for name in sorted(pictures) if name.endswith(".png"))


def test_samples_and_sources_are_counted_by_what_they_are(new, old, tmp_path, monkeypatch):
    keys = [set(Dataset.open(uri).index()["key"].to_pylist()) for uri in (new, old)]
    monkeypatch.setattr("pipelines.data.index._BATCH", 2)
    monkeypatch.delattr(Dataset, "index")  # no index is held whole
    found = inspect_against(new, old, tmp_path / "p.html", progress=False)
    assert found.samples == {
        "new": len(keys[0]), "old": len(keys[1]), "same": 0, "changed": len(keys[0] & keys[1]),
        "added": len(keys[0] - keys[1]), "gone": len(keys[1] - keys[0]),
    }  # fmt: skip
    assert len(keys[0] & keys[1]) >= 2  # of x.png at least
    assert found.sources == {"added": 1, "changed": 1, "gone": 1}
    assert found.changed["lr"] == len(keys[0] & keys[1])
    assert found.recipe == {"degradation.jpeg1_quality": [[60, 95], [30, 50]]}
    text = " ".join(" ".join(Loads((tmp_path / "p.html").read_text()).shown).split())
    for expected in ("Added 1 2.jpg", "Other content under the same name 1 1.jpg", "Gone 1 0.jpg", "[30, 50]"):
        assert expected in text


def test_how_much_of_a_parameter_moved_is_what_its_values_say(new, old, tmp_path):
    found = inspect_against(new, old, tmp_path / "p.html", progress=False)
    values = [Dataset.open(uri).index()["deg_jpeg1_quality"].to_pylist() for uri in (new, old)]
    shares = [{value: drawn.count(value) / len(drawn) for value in drawn} for drawn in values]
    moved = sum(abs(shares[0].get(value, 0) - shares[1].get(value, 0)) for value in shares[0] | shares[1]) / 2
    one = found.parameters["deg_jpeg1_quality"]
    assert one["moved"] == pytest.approx(moved, abs=1e-6)
    assert one["mean"] == pytest.approx(np.mean([value for value in values[0] if value is not None]))
    assert "recipe 60 to 95 → 30 to 50" in (tmp_path / "p.html").read_text()


def test_a_dataset_against_itself_did_not_change_and_another_split_is_no_other_sample(made, old, pictures, tmp_path):
    same = inspect_against(old, old, tmp_path / "p.html", progress=False)
    assert same.samples["same"] == same.samples["new"] == same.checked
    assert (same.unequal_bytes, same.recipe) == (0, {})
    assert "No parameter moved" in (tmp_path / "p.html").read_text()
    split = made("split", contents(pictures), split={"validation_patterns": ["x.png"]})
    found = inspect_against(split, old, tmp_path / "p.html", progress=False)
    assert found.changed == {"hr": 0, "lr": 0, "split": 2}
    assert (found.checked, found.unequal_bytes) == (found.samples["new"], 0)


def test_where_other_crops_were_taken_sources_stand_beside_each_other(made, old, pictures, tmp_path):
    large = made("large", {"x.png": png(pictures)}, crop={"size": 96})
    assert set(Dataset.open(large).index()["key"].to_pylist()).isdisjoint(Dataset.open(old).index()["key"].to_pylist())
    found = inspect_against(large, old, tmp_path / "p.html", progress=False)
    assert (found.samples["changed"], found.shown) == (0, 1)
    html = (tmp_path / "p.html").read_text()
    assert "The same sources under both" in html
    assert "HR before" in html
    assert "HR now" in html


def test_the_run_that_made_the_dataset_gets_a_picture(new, old, new_store, tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert cli.main(["inspect", new, "--against", old, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["inspection.html"]  # no store is made for it
    uri, tags = new_store(tmp_path), {"deedsr.kind": "shards"}
    with tracking.start_run("deedsr-shards", name="new", config={}, tags=tags, tracking_uri=uri) as run:
        run.log_dataset(Dataset.open(new), context="shards")
    assert cli.main(["inspect", new, "--against", old]) == 0
    assert "% moved" in capsys.readouterr().out
    client = MlflowClient(tracking_uri=uri)
    [picture] = client.list_artifacts(run.id, "pictures")
    assert picture.path == f"pictures/against-{Dataset.open(old).digest[:12]}.png"
    assert client.get_run(run.id).info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert cli.main(["inspect", new, "--against", old, "--out", "again.html"]) == 0
    assert Path("again.html").exists()
    assert "its picture is not in MLflow" in caplog.text


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_compares_in_a_browser(browser, new, old, tmp_path, width):
    inspect_against(new, old, tmp_path / "p.html", progress=False)
    browser.open_and_check(tmp_path / "p.html", width)
    assert browser.run("document.querySelector('#pair-0 .tag.is-before').textContent") == "LR before"
    assert browser.run(
        "document.querySelector('#pair-0 img.before').src != document.querySelector('#pair-0 img.after').src"
    )
