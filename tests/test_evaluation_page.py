"""Claims about the page of an evaluation: which pictures it shows, and how it looks in a browser."""

import cv2
import numpy as np
import pytest

from deedsr.metrics.intervals import differences, means
from deedsr.metrics.registry import selected
from pipelines.reports.evaluation import groups, ranked, write_evaluation
from pipelines.reports.tables import differences_table, means_table

MEASURES = selected(("psnr", "niqe"))
LABELS = {"model": "our <model>", "bicubic": "bicubic"}


def record(number: int) -> dict:
    """The model is ahead by 0, 1, .. dB; the last picture has no NIQE."""
    niqe = None if number == 12 else 5.0
    metrics = {"model": {"psnr": 20.0 + number, "niqe": niqe}, "bicubic": {"psnr": 20.0, "niqe": 9.0 - number}}
    return {"key": f"picture-{number:02d}", "metrics": metrics, "pictures": {}}


@pytest.fixture(scope="module")
def page(photos, tmp_path_factory):
    records = [record(number) for number in range(13)]
    values = {
        name: {method: [one["metrics"][method][name] for one in records] for method in LABELS} for name in MEASURES
    }
    found = {name: means(one) for name, one in values.items()}
    metrics = {method: {name: found[name][method] for name in MEASURES} for method in LABELS}
    changes = [one for name in MEASURES for one in differences(name, values[name], MEASURES[name].higher_is_better)]
    tables = [means_table(metrics, MEASURES, LABELS), differences_table(changes, MEASURES, LABELS)]
    photo = cv2.imread(str(photos / "validation" / "Sea-of-Lanterns.jpg"))[:256, :256, ::-1]
    small = np.ascontiguousarray(photo[::4, ::4])
    read = lambda one: {"lr": small, "bicubic": cv2.blur(photo, (5, 5)), "model": photo, "hr": photo}
    place = tmp_path_factory.mktemp("page") / "evaluation.html"
    rejected = {"dark": "16 bits <a channel>"}
    write_evaluation(place, LABELS, {"Pictures": "13"}, tables, MEASURES, records, rejected, read)
    return place


def test_pictures_are_sorted_by_difference_and_by_the_direction_of_the_metric():
    records = [record(number) for number in (3, 1, 2)]
    keys = lambda name: [one.record["key"][-1] for one in ranked(records, ["model", "bicubic"], MEASURES[name])]
    assert keys("psnr") == ["3", "2", "1"]
    assert keys("niqe") == ["1", "2", "3"]
    assert [one.value for one in ranked(records, ["model"], MEASURES["psnr"])] == [23, 22, 21]
    assert len(ranked([record(12)], ["model", "bicubic"], MEASURES["niqe"])) == 0
    assert groups(13) == {"Best": [0, 1, 2], "Around the median": [5, 6, 7], "Worst": [12, 11, 10]}
    assert groups(9) == {"All pictures": [*range(9)]}


def test_the_page_shows_the_best_the_median_and_the_worst(page):
    html = page.read_text()
    shown = [part.partition("</h3>")[0] for part in html.split("<h3>")[1:]]
    assert shown == [f"picture-{number:02d}" for number in (12, 11, 10, 7, 6, 5, 0, 1, 2)]
    for text in ("our &lt;model&gt; and bicubic", "26.00", "+6.00", "96%", "dark: 16 bits &lt;a channel&gt;"):
        assert text in html, text
    assert "<model>" not in html


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_and_sliders_compare_the_two_methods(browser, page, width):
    browser.open_and_check(page, width)
    tags = "[...document.querySelectorAll('#scene-12 .stage .tag')].map(t => t.textContent).join()"
    assert browser.run(tags) == "bicubic,our <model>"
    browser.run("document.querySelector('#scene-12 .stage input').focus()")
    browser.key("ArrowRight")
    at = "parseFloat(document.querySelector('#scene-12 .stage').style.getPropertyValue('--at'))"
    assert browser.run(at) == 51
    assert browser.errors == []
