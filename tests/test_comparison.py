"""Claims on `compare`, against a real SQLite store."""

import itertools
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import stats

from deedsr.errors import UsageError
from jobs import cli
from pipelines import tracking
from pipelines.reports import charts
from pipelines.reports.charts import TONES, Curve, draw
from pipelines.reports.comparison import compare
from pipelines.storage import open_storage
from pipelines.tracking import DatasetInput

LIGHT, HEAVY = "1" * 64, "2" * 64
SAMPLES = {"A": np.array([20.0, 21, 22, 19, 24, 21]), "B": np.array([25.0, 25, 27, 24, 27, 26, 30])}
TEMPLATES = Path(charts.__file__).parent / "templates"


@pytest.fixture(scope="module")
def store(new_store, tmp_path_factory, photos) -> str:
    """Two learners, and evaluations of two models on two datasets."""
    uri = new_store(tmp_path_factory.mktemp("mlflow"))
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
            config = {"model": model, "split": "validation", "metrics": "psnr"}
            parents = {"learner": learners["slow" if model == "A" else "fast"]}
            with run("deedsr-evaluation", model, config, dataset, parents) as evaluation:
                evaluation.log_metrics({"model.psnr": psnr + (dataset == LIGHT)})
                evaluation.log_picture("key-00", picture)
                if dataset == LIGHT:
                    samples = [{"key": f"{n}", "metrics": {"model": {"psnr": v}}} for n, v in enumerate(SAMPLES[model])]
                    evaluation.log_text(json.dumps({"samples": samples}), "results.json")
    with run("deedsr-evaluation", "A", {"model": "A", "split": "train", "metrics": "psnr"}, LIGHT) as evaluation:
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
    blocks = (tmp_path / "c.html").read_text().split('<div class="card"')[1:]
    results = [block for block in blocks if "deedsr-evaluation · dataset" in block]
    assert len(results) == 3
    for block in results:
        shown = {figure for figure in ("20.25", "21.25", "24.50", "25.50", "31.00") if f">{figure}<" in block}
        assert shown in ({"31.00"}, {"21.25", "25.50"}, {"20.25", "24.50"})
    differing, *results, _ = comparison.text().split("\n\n")
    assert differing.startswith("deedsr-evaluation: what differs")
    assert len(results) == 3
    for block in results:
        assert len({LIGHT[:12] in block, HEAVY[:12] in block}) == 2


def test_figures_of_two_definitions_never_share_a_row(new_store, tmp_path):
    """Three evaluations of one dataset: one from before definitions were recorded, one with a border, one without."""
    uri = new_store(tmp_path)
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
    page, text = (tmp_path / "c.html").read_text(), comparison.text(width=300)
    for shown in (page, text):
        assert "model.psnr, definition not recorded" in shown
        assert "25.25" in shown
        assert "border 4" in shown
    assert page.count('<div class="chart"') == 4  # three of PSNR, one of NIQE


def test_losses_by_timestep_share_a_chart(store, tmp_path):
    page = compare("deedsr-learner", tmp_path / "c.html", store).page
    drawn = [chart for chart in Path(page).read_text().split('<div class="chart"') if "slow · 000" in chart]
    assert len(drawn) == 1
    assert all(f"{run} · {low}" in drawn[0] for run in ("slow", "fast") for low in ("000", "500"))


def test_only_settings_that_differ_are_shown(store):
    (section,) = compare("deedsr-learner", tracking_uri=store).sections
    assert section.differing == ["train.lr"]
    assert [run["config"] for run in section.runs] == [{"train.lr": "0.1"}, {"train.lr": "0.01"}]


def test_what_differs_stands_first_and_has_data_commit_and_the_settings_of_the_model(store, tmp_path):
    """The evaluations of A measured the slow learner's model, those of B the fast one's."""
    comparison = compare("deedsr-evaluation", tmp_path / "c.html", store)
    (section,) = comparison.sections
    assert section.differing == ["data", "learner.train.lr", "model", "split"]
    rates = {(run["name"], run["config"]["learner.train.lr"]) for run in section.runs if run["parents"]}
    assert rates == {("A", "0.01"), ("B", "0.1")}
    html = Path(comparison.page).read_text()
    assert html.index("What differs") < html.index("Best first by")


def test_evaluations_stand_best_first_with_an_interval_from_the_pairs_that_both_measured(store, tmp_path):
    comparison = compare("deedsr-evaluation", tmp_path / "c.html", store)
    group = next(g for g in comparison.groups if LIGHT[:12] in g.title and "validation" in g.title)
    assert ([run["name"] for run in group.runs], group.ranked_by) == (["B", "A"], "model.psnr")
    found = group.runs[1]["against_best"]["model.psnr"]
    changes = SAMPLES["A"] - SAMPLES["B"][:6]
    expected = stats.bootstrap(
        [changes], np.mean, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found["samples"] == 6  # B measured one more
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=0.1)
    assert found["difference"] == pytest.approx(np.mean(changes))
    assert "[" in comparison.text(300)
    other = next(g for g in comparison.groups if HEAVY[:12] in g.title)
    assert other.runs[1]["against_best"] == {}  # no samples were recorded


def test_runs_are_chosen_by_id_its_beginning_name_filter_and_number(store):
    everything = compare(tracking_uri=store).runs
    first = everything[0]
    for chosen in (first["run_id"], first["run_id"][:9]):
        assert [run["run_id"] for run in compare(tracking_uri=store, runs=[chosen]).runs] == [first["run_id"]]
    assert {run["name"] for run in compare(tracking_uri=store, runs=["slow", "B"]).runs} == {"slow", "B"}
    newest = sorted(everything, key=lambda run: run["started"])[-1]
    assert len(compare(tracking_uri=store, last=2).runs) == 2
    assert newest["name"] in {run["name"] for run in compare(tracking_uri=store, last=2).runs}
    found = compare("deedsr-evaluation", None, store, condition="metrics.`model.psnr` > 25")
    assert sorted(run["metrics"]["model.psnr"] for run in found.runs) == [25.5, 31.0]
    for wanted, said in (
        ({"runs": ["nobody"]}, "no run nobody"),
        ({"condition": "nonsense"}, "does not take the filter 'nonsense'"),
        ({"condition": "metrics.psnr > 99"}, "holds no run that matches metrics.psnr > 99"),
    ):
        with pytest.raises(UsageError, match=said):
            compare(tracking_uri=store, **wanted)


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_terminal_table_fits_the_window_and_names_what_it_leaves_out(store, width):
    text = compare(tracking_uri=store).text(width)
    assert max(map(len, text.splitlines())) <= width
    assert ("a wider window shows also" in text) == (width == 60)
    for name in ("slow", "fast", "A", "B"):
        assert f"\n{name} " in text


def test_best_and_last_of_a_training_are_told_apart(new_store, tmp_path):
    uri = new_store(tmp_path)
    with tracking.start_run("deedsr-adapter", name="a", config={}, tracking_uri=uri, system_metrics=False) as run:
        for step, (psnr, loss) in enumerate([(20.0, 3.0), (24.5, 1.0), (23.0, 2.0)], 1):
            run.log_metrics({"validation/psnr_y": psnr, "validation/loss": loss, "validation/seconds": 1.0}, step)
    (row,) = compare(tracking_uri=uri).runs
    metrics = {name: value for name, value in row["metrics"].items() if not name.endswith("seconds")}
    assert metrics == {"best/psnr_y": 24.5, "best/loss": 1.0, "validation/psnr_y": 23.0, "validation/loss": 2.0}
    assert row["steps"]["best/psnr_y"] == row["steps"]["best/loss"] == 2
    assert "24.5 at 2" in compare(tracking_uri=uri).text(300)


def test_ids_lead_to_mlflow(store, tmp_path):
    comparison = compare("deedsr-learner", tmp_path / "c.html", store)
    html = Path(comparison.page).read_text()
    for run in comparison.runs:
        assert f"/runs/{run['run_id']}?workflowType=machine_learning" in run["link"]
        assert f'href="{run["link"]}"' in html
    assert "mlflow ui --backend-store-uri" in html


def seen(colour: np.ndarray, as_by: np.ndarray) -> np.ndarray:
    """OKLab of an sRGB colour, as somebody sees it (Machado et al. 2009)."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
              [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
              [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ np.clip(as_by @ linear, 0, 1))


DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
)


def test_the_colours_of_charts_stay_apart_also_without_green():
    style = (TEMPLATES / "style.html").read_text()
    for theme in style.split("prefers-color-scheme"):
        tones = re.findall(r"--(?:t\d|rest): #([0-9a-f]{6})", theme)
        if not tones:
            continue
        assert len(tones) == TONES + 1
        colours = [np.array([int(tone[i : i + 2], 16) / 255 for i in (0, 2, 4)]) for tone in tones]
        for eyes, least in ((np.eye(3), 0.15), (DEUTERANOPIA, 0.08)):
            labs = [seen(colour, eyes) for colour in colours]
            assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(labs, 2)) > least


def test_runs_beyond_the_eighth_are_grey_until_pointed_at(browser, tmp_path):
    curves = [Curve(f"run-{number}", [(1, number), (2, number), (3, number)], number) for number in range(12)]
    (tmp_path / "chart.html").write_text(f"<body>{draw(curves, 'loss')}{(TEMPLATES / 'script.html').read_text()}")
    browser.open(tmp_path / "chart.html", 800)
    assert browser.run("document.querySelectorAll('.line.tone-rest').length") == 4
    assert browser.run("document.querySelectorAll('.legend li').length") == 9
    browser.run("document.querySelector('.plot').style.height = '240px'")
    box = "document.querySelector('.plot').getBoundingClientRect()"
    place = browser.run(f"[{box}.x + {box}.width / 2, {box}.y, {box}.height]")
    low_high = json.loads(browser.run("document.querySelector('.chart').dataset.chart"))["y"]
    y = place[1] + place[2] * (1 - (11 - low_high[0]) / (low_high[1] - low_high[0]))
    browser.mouse("mouseMoved", place[0], y)
    assert browser.run("document.querySelector('.line.pointed').dataset.line") == "11"
    assert "run-11  11" in browser.run("document.querySelector('.readout').textContent")
    assert "run-10" not in browser.run("document.querySelector('.readout').textContent")


@pytest.mark.parametrize("width", [390, 1400])
def test_the_name_of_a_run_stays_in_sight_while_its_table_is_scrolled(browser, store, tmp_path, width):
    browser.open(Path(compare("deedsr-evaluation", tmp_path / "c.html", store).page), width)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    browser.run("document.querySelectorAll('.scroll').forEach(box => { box.scrollLeft = 10000 })")
    name = "box.querySelector('th[scope=row]').getBoundingClientRect().left - box.getBoundingClientRect().left"
    places = browser.run(f"[...document.querySelectorAll('.scroll')].map(box => {name})")
    assert places == pytest.approx([0] * 4, abs=1)
    assert browser.errors == []


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
    drawn = html.split('<div class="chart"')[1:]
    assert len(drawn) == 3  # loss, loss by timestep, and samples per second
    assert sorted(chart.count('class="line') for chart in drawn) == [2, 2, 4]
    assert all("</i>fast" in chart for chart in drawn)
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


def test_the_terminal_lists_runs_and_shows_one(store, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main(["runs", "list", "--experiment", "deedsr-learner", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert [run["name"] for run in listed] == ["fast", "slow"]
    assert cli.main(["runs", "list", "--last", "3"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert (len(lines), "model.psnr 31.00" in lines[1]) == (4, True)
    fast = listed[0]["run_id"]
    assert cli.main(["runs", "show", fast[:10]]) == 0
    text = capsys.readouterr().out
    for expected in (fast, "loss 0.2", "train.lr: 0.1", "#/experiments/"):
        assert expected in text
    assert cli.main(["runs", "show", "nobody"]) == 2
    assert "no run nobody" in capsys.readouterr().err
