"""Claims on `compare`, against a real SQLite store."""

import json
from pathlib import Path

import cv2
import pytest

from deedsr.errors import UsageError
from pipelines import tracking
from pipelines.reports.comparison import compare
from pipelines.storage import open_storage
from pipelines.tracking import DatasetInput

LIGHT, HEAVY = "1" * 64, "2" * 64


@pytest.fixture(scope="module")
def store(tmp_path_factory, photos) -> str:
    """Two learners, and evaluations of two models on two datasets."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    picture = cv2.imread(str(photos / "validation" / "Yellow-Flower.jpg"))[:32, :96, ::-1]

    def run(experiment, name, config, dataset, parents=None):
        data = DatasetInput(dataset, "shards")
        options = {"name": name, "config": config, "dataset": data, "parents": parents, "system_metrics": False}
        return tracking.start_run(experiment, tracking_uri=uri, **options)

    learners = {}
    for name, rate in {"slow": 0.01, "fast": 0.1}.items():
        with run("deedsr-learner", name, {"train": {"lr": rate, "max_steps": 50}, "same": 1}, LIGHT) as learner:
            for step in range(1, 51):
                learner.log_metrics({"loss": 1 / (rate * step), "samples_per_second": 30.0}, step)
                learner.log_metrics({f"loss_timestep/{low:03d}": step / (low + 1) for low in (0, 500)}, step)
        learners[name] = learner.id
    for model, psnr in {"A": 20.25, "B": 24.5}.items():
        for dataset in (LIGHT, HEAVY):
            config = {"model": model, "split": "validation"}
            parents = {"learner": learners["fast"]}
            with run("deedsr-evaluation", model, config, dataset, parents) as evaluation:
                evaluation.log_metrics({"model.psnr": psnr + (dataset == LIGHT)})
                evaluation.log_picture("key-00", picture)
    with run("deedsr-evaluation", "A", {"model": "A", "split": "train"}, LIGHT) as evaluation:
        evaluation.log_metrics({"model.psnr": 31.0})
    return uri


def test_figures_of_two_datasets_or_splits_never_share_a_table(store, tmp_path):
    comparison = compare("deedsr-evaluation", tmp_path / "c.html", store)
    tables = {group.title: {(r["name"], r["metrics"]["model.psnr"]) for r in group.runs} for group in comparison.groups}
    assert tables == {
        f"deedsr-evaluation · dataset {LIGHT[:12]} · train": {("A", 31.0)},
        f"deedsr-evaluation · dataset {LIGHT[:12]} · validation": {("A", 21.25), ("B", 25.5)},
        f"deedsr-evaluation · dataset {HEAVY[:12]} · validation": {("A", 20.25), ("B", 24.5)},
    }
    blocks = (tmp_path / "c.html").read_text().split("<section")[1:]
    assert len(blocks) == 3
    for block in blocks:
        shown = {figure for figure in ("20.25", "21.25", "24.50", "25.50", "31.00") if f">{figure}<" in block}
        assert shown in ({"31.00"}, {"21.25", "25.50"}, {"20.25", "24.50"})
    for block in comparison.text().split("\n\n")[:3]:
        assert len({LIGHT[:12] in block, HEAVY[:12] in block}) == 2


def test_figures_of_two_definitions_never_share_a_row(tmp_path):
    """Three evaluations of one dataset: one from before definitions were recorded, one with a border, one without."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for name, psnr, border in (("old", 25.125, None), ("bordered", 25.25, 4), ("whole", 25.375, 0), ("again", 25.5, 0)):
        stated = {} if border is None else {"definitions": {"psnr": f"border {border}"}}
        with tracking.start_run(
            "deedsr-evaluation",
            name=name,
            config={"split": "validation"} | stated,
            dataset=DatasetInput(LIGHT, "shards"),
            tracking_uri=uri,
            system_metrics=False,
        ) as run:
            for step in (1, 2):
                run.log_metrics({"model.psnr": psnr, "model.niqe": 5.0}, step)
    comparison = compare("deedsr-evaluation", tmp_path / "c.html", uri)
    rows = {run["name"]: run["metrics"] for run in comparison.runs}
    assert rows == {
        "old": {"model.psnr, definition not recorded": 25.125, "model.niqe": 5.0},
        "bordered": {"model.psnr, definition 2": 25.25, "model.niqe": 5.0},
        "whole": {"model.psnr, definition 1": 25.375, "model.niqe": 5.0},
        "again": {"model.psnr, definition 1": 25.5, "model.niqe": 5.0},
    }
    assert {run["name"]: run["config"]["definitions.psnr"] for run in comparison.runs}["bordered"] == "border 4"
    page, text = (tmp_path / "c.html").read_text(), comparison.text()
    for shown in (page, text):
        assert "model.psnr, definition not recorded" in shown
        assert "25.25" in shown
        assert "border 4" in shown
    assert page.count('<div class="chart"') == 4  # three of PSNR, one of NIQE


def test_losses_by_timestep_share_a_chart(store, tmp_path):
    page = compare("deedsr-learner", tmp_path / "c.html", store).page
    charts = [chart for chart in Path(page).read_text().split('<div class="chart"') if "slow · 000" in chart]
    assert len(charts) == 1
    assert all(f"{run} · {low}" in charts[0] for run in ("slow", "fast") for low in ("000", "500"))


def test_only_settings_that_differ_are_shown(store):
    (group,) = compare("deedsr-learner", tracking_uri=store).groups
    assert [run["config"] for run in group.runs] == [{"train.lr": "0.1"}, {"train.lr": "0.01"}]


def test_a_run_tells_its_figures_parents_time_and_throughput(store):
    comparison = compare(tracking_uri=store)
    assert json.loads(json.dumps(comparison.runs)) == comparison.runs
    assert len(comparison.runs) == 7
    learners = {run["name"]: run for run in comparison.runs if run["experiment"] == "deedsr-learner"}
    assert learners["fast"]["metrics"]["loss"] == pytest.approx(0.2)
    assert learners["fast"]["samples_per_second"] == 30.0
    assert learners["fast"]["seconds"] >= 0
    assert learners["fast"]["dataset_digest"] == LIGHT
    evaluations = [run for run in comparison.runs if run["name"] == "B"]
    assert [run["parents"] for run in evaluations] == [{"learner": learners["fast"]["run_id"]}] * 2


def test_the_text_names_every_run_and_figure(store):
    text = compare("deedsr-learner", tracking_uri=store).text()
    for expected in ("slow", "fast", "loss", "0.2", "train.lr", "0.01", "finished"):
        assert expected in text


def test_the_page_overlays_curves_and_holds_the_pictures(store, tmp_path):
    page = compare(None, tmp_path / "all.html", store).page
    html = Path(page).read_text()
    charts = html.split('<div class="chart"')[1:]
    assert len(charts) == 3  # loss, loss by timestep, and samples per second
    assert sorted(chart.count('class="line') for chart in charts) == [2, 2, 4]
    assert all("</i>fast" in chart for chart in charts)
    assert html.count("data:image/webp") == 4
    assert 'src="http' not in html


def test_the_page_is_written_to_a_bucket_and_one_that_cannot_be_is_refused(store, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = f"{bucket}/{tmp_path.name}/pages/c.html"
    assert compare("deedsr-learner", uri, store).page == uri
    assert open_storage(f"{bucket}/{tmp_path.name}").read("pages/c.html").startswith(b"<!doctype html>")
    with pytest.raises(UsageError, match="no bucket 'no-such-bucket'"):
        compare("deedsr-learner", "s3://no-such-bucket/c.html", store)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_experiment_lists_those_there_are(store):
    with pytest.raises(UsageError, match="no experiment deedsr-lerner.*deedsr-evaluation, deedsr-learner"):
        compare("deedsr-lerner", tracking_uri=store)


def test_an_experiment_without_runs_says_so(store):
    tracking.connect(store).create_experiment("still-empty")
    with pytest.raises(UsageError, match="still-empty .* holds no run yet"):
        compare("still-empty", tracking_uri=store)


def test_where_no_store_is_none_is_made(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no MLflow store at .*mlflow.db"):
        compare()
    assert list(tmp_path.iterdir()) == []
