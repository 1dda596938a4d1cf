"""Claims on the report page, made from real photographs through the real degradation, looked at in a real browser."""

import base64
import json
import math
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
from browser import Loads

from deedsr.dataset.recipe import load_recipe
from deedsr.degradation import degrade, draw_degradation
from deedsr.errors import DeeDSRError
from pipelines.data.dataset import Sample
from pipelines.reports.charts import Curve, draw, ticks
from pipelines.reports.page import PictureSet, describe_degradation
from pipelines.reports.report import (
    DemoReport,
    Evaluation,
    Step,
    Training,
    evaluated_pictures,
    evaluation_of,
    write_report,
)
from pipelines.reports.tables import methods_table

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def pairs(photos):
    """HR, LR and drawn degradation of crops of the validation photographs."""
    ranges = load_recipe("deedsr").degradation
    made = []
    for number, path in enumerate(sorted((photos / "validation").glob("*.jpg"))[:3]):
        photo = cv2.imread(str(path))[..., ::-1]
        top, left = photo.shape[0] // 3, photo.shape[1] // 3
        hr = np.ascontiguousarray(photo[top : top + 256, left : left + 256])
        draws = draw_degradation(ranges, (256, 256), 4, np.random.default_rng(number))
        made.append((path.stem, hr, degrade(hr, draws), draws))
    return made


@pytest.fixture(scope="module")
def report(pairs) -> DemoReport:
    def versions(hr, lr):
        bicubic = cv2.resize(lr, hr.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        return {"LR": lr, "Bicubic": bicubic, "tiny": cv2.bilateralFilter(bicubic, 5, 20, 5), "HR": hr}

    info = {"source": {"path": "a.jpg"}, "crop": [0, 0, 256, 256], "flip": False}
    wide = np.ascontiguousarray(np.hstack([hr for _, hr, _, _ in pairs]))
    return DemoReport(
        title="Photographs & <pictures>",
        summary="The whole chain.",
        seconds=552.0,
        dataset_digest=DIGEST,
        steps=[
            Step("Degradation shards", "deedsr shards --source photos --out shards", 30.0, "12 pairs"),
            Step(
                "Degradation learner", "deedsr train learner --data shards " + "--very.long.option 1 " * 12, 90.0, "3"
            ),
        ],
        evaluation=Evaluation(DIGEST, 24, {"Bicubic": {"psnr": 22.8}, "tiny": {"psnr": 23.6}}),
        trainings=[
            Training("Degradation learner", [Curve("loss", [(s, 5 / s) for s in range(1, 90)])], 89, 0.5, {"lr": 0.1})
        ],
        samples=[Sample(name, hr, lr, {**info, "degradation": draws}) for name, hr, lr, draws in pairs],
        pictures=[PictureSet(name, versions(hr, lr)) for name, hr, lr, _ in pairs]
        + [PictureSet("wide", {"Bicubic": cv2.blur(wide, (9, 9)), "tiny": wide})],
        versions={"torch": "2.13.0"},
        machine={"CPU": "2 cores"},
        links=[("Lossless pictures", "pictures/")],
        commands=[("Browse the runs", "mlflow ui --backend-store-uri sqlite:////home/anna/demo/mlflow.db")],
    )


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("report") / "report.html", report)


def pictures_in(loads: list[str]) -> list[np.ndarray]:
    data = [base64.b64decode(src.partition("base64,")[2]) for src in loads if src.startswith("data:image")]
    return [cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for d in data]


def test_the_page_loads_nothing_from_anywhere(page):
    html = page.read_text()
    found = Loads(html)
    assert found.loads
    assert [src for src in found.loads if not src.startswith("data:")] == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|<iframe|<object", html)
    assert [href for href in found.links if not href.startswith("#")] == ["pictures/"]


def test_every_picture_is_in_the_page_once(page, report):
    pictures = pictures_in(Loads(page.read_text()).loads)
    given = [picture for scene in report.pictures for picture in scene.versions.values()]
    given += [picture for sample in report.samples for picture in (sample.hr, sample.lr)]
    assert len(pictures) == len(given)
    for shown, original in zip(pictures, given, strict=True):
        assert shown.shape == original.shape
        if original.shape[0] == 64:
            assert np.array_equal(shown, original)  # LR pictures keep every pixel
        else:
            assert cv2.PSNR(shown.copy(), original) > 30


def test_the_page_says_what_was_run(page, report):
    text = " ".join(Loads(page.read_text()).shown)
    for expected in (
        "Photographs & <pictures>",
        "9 min 12 s",
        DIGEST,
        "torch",
        "2.13.0",
        "2 cores",
        "24 pairs",
        "lr: 0.1",
        *(step.command for step in report.steps),
        report.commands[0][1],
    ):
        assert expected in text, expected
    assert "<pictures>" not in page.read_text()


def test_a_dozen_scenes_stay_under_eight_megabytes(report, photos, tmp_path):
    photo = cv2.imread(str(photos / "validation" / "Sea-of-Lanterns.jpg"))[:512, :512, ::-1]
    versions = {"LR": photo[::4, ::4], "Bicubic": cv2.blur(photo, (5, 5)), "demo": photo, "tiny": photo, "HR": photo}
    scenes = [PictureSet(f"scene {i}", versions) for i in range(12)]
    assert write_report(tmp_path / "r.html", replace(report, pictures=scenes)).stat().st_size < 8e6


def test_a_report_that_fails_leaves_the_old_one(report, tmp_path):
    out = write_report(tmp_path / "report.html", report)
    before = out.read_bytes()
    with pytest.raises(FileNotFoundError, match="missing.png"):
        write_report(out, replace(report, pictures=[PictureSet("x", {"LR": tmp_path / "missing.png"})]))
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_drawn_values_are_told_in_their_order(pairs):
    draws = pairs[0][3]
    told = describe_degradation(draws)
    assert len(told) == len(draws["steps"])
    for (name, values), step in zip(told, draws["steps"], strict=True):
        assert step["step"].startswith(name.lower())
        if "quality" in step:
            assert str(step["quality"]) in values
        if "sigma" in step:
            assert f"{step['sigma']:.1f}" in values
        if "kernel" in step:
            assert f"{step['size']} px" in values


def test_the_best_figure_is_the_highest_psnr_and_the_lowest_niqe():
    table = methods_table({"Bicubic": {"psnr": 22.0, "niqe": 9.0}, "demo": {"psnr": 21.0, "niqe": 5.0, "ssim": None}})
    assert table.head == ["PSNR-Y dB ↑", "NIQE ↓", "SSIM-Y ↑"]
    assert table.rows == [
        ("Bicubic", [("22.00", "", True, ""), ("9.00", "", False, ""), ("–", "", False, "")]),
        ("demo", [("21.00", "−1.00", False, "bad"), ("5.00", "−4.00", True, "good"), ("–", "", False, "")]),
    ]


def evaluation(folder, pairs, digest, psnr):
    """What an evaluation leaves: results.json and pictures."""
    (folder / "pictures").mkdir(parents=True)
    samples = []
    for key, hr, lr, _ in pairs:
        big = cv2.resize(lr, hr.shape[1::-1])
        pictures = {}
        for name, picture in {"lr": lr, "bicubic": big, "model": big, "hr": hr}.items():
            pictures[name] = f"pictures/{key}.{name}.png"
            cv2.imwrite(str(folder / pictures[name]), picture[..., ::-1])
        metrics = {"model": {"psnr": psnr}, "bicubic": {"psnr": 20.0}}
        samples.append({"key": key, "source": {"path": f"a/{key}.jpg"}, "metrics": metrics, "pictures": pictures})
    result = {
        "dataset": {"digest": digest, "split": "validation"},
        "metrics": {"model": {"psnr": {"mean": psnr}}, "bicubic": {"psnr": {"mean": 20.0}}},
        "samples": samples,
    }
    (folder / "results.json").write_text(json.dumps(result))
    return result


def test_evaluations_share_a_table_only_on_the_same_pairs(pairs, tmp_path):
    demo = evaluation(tmp_path / "demo", pairs, DIGEST, 21.0)
    tiny = evaluation(tmp_path / "tiny", pairs, DIGEST, 23.0)
    table = evaluation_of({"This demo": demo, "tiny": tiny})
    assert table.metrics == {"Bicubic": {"psnr": 20.0}, "This demo": {"psnr": 21.0}, "tiny": {"psnr": 23.0}}
    assert (table.dataset_digest, table.samples) == (DIGEST, len(pairs))
    for other in (
        evaluation(tmp_path / "other", pairs, "f" * 64, 25.0),
        evaluation(tmp_path / "fewer", pairs[:2], DIGEST, 25.0),
    ):
        with pytest.raises(DeeDSRError, match="different pairs"):
            evaluation_of({"This demo": demo, "tiny": other})


def test_evaluations_share_a_table_only_by_equal_definitions(pairs, tmp_path):
    demo = evaluation(tmp_path / "demo", pairs, DIGEST, 21.0) | {"definitions": {"psnr": "border 0"}}
    tiny = evaluation(tmp_path / "tiny", pairs, DIGEST, 23.0)
    assert evaluation_of({"This demo": demo, "tiny": tiny | {"definitions": {"psnr": "border 0"}}}).samples
    for other, told in (
        (tiny, "border 0 / not recorded"),
        (tiny | {"definitions": {"psnr": "border 4"}}, "0 / border 4"),
    ):
        with pytest.raises(DeeDSRError, match=f"definitions of psnr.*{told}"):
            evaluation_of({"This demo": demo, "tiny": other})


def test_no_figure_of_a_metric_of_unknown_direction_is_called_the_best():
    table = methods_table({"Bicubic": {"other:x": 2.0, "lpips": 0.4}, "demo": {"other:x": 1.0, "lpips": 0.3}})
    (_, (_, _)), (_, (other, lpips)) = table.rows
    assert (other.best, other.tone, other.note) == (False, "bad", "−1")
    assert (lpips.best, lpips.tone) == (True, "good")


def test_pictures_of_evaluations_stand_in_one_scene(pairs, tmp_path):
    for label, psnr in {"This demo": 21.0, "tiny": 23.0}.items():
        evaluation(tmp_path / label, pairs, DIGEST, psnr)
    key = pairs[1][0]
    (scene,) = evaluated_pictures({label: tmp_path / label for label in ("This demo", "tiny")}, [key])
    assert list(scene.versions) == ["LR", "Bicubic", "This demo", "tiny", "HR"]
    assert scene.figures == {"Bicubic": "20.00 dB", "This demo": "21.00 dB", "tiny": "23.00 dB"}
    assert scene.versions["tiny"] == tmp_path / "tiny" / "pictures" / f"{key}.model.png"


def test_ticks_are_round_and_enclose_the_values():
    assert ticks(0.3, 9.7, 6) == [0, 2, 4, 6, 8, 10]
    assert ticks(1, 200, 6) == [0, 50, 100, 150, 200]
    assert ticks(0.0011, 0.0029, 5) == [0.001, 0.0015, 0.002, 0.0025, 0.003]
    assert ticks(-3, 4, 5)[0] <= -3
    assert len(ticks(5, 5, 5)) > 1


def test_curves_leave_out_what_is_not_a_number_and_name_each_line():
    svg = draw([Curve("a <b>", [(1, 2.0), (2, math.nan), (3, 1.0)]), Curve("none", [(1, math.inf)])], "loss")
    assert svg.count('class="line') == 1
    assert "nan" not in svg.lower()
    assert "No measurement" in draw([Curve("loss", [])], "loss")
    two = draw([Curve("a <b>", [(1, 2.0), (3, 1.0)]), Curve("c", [(1, 1.0), (2, 2.0)])], "loss")
    assert "</i>a &lt;b&gt;</li>" in two
    assert "</i>c</li>" in two


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_and_nothing_is_requested(browser, page, width):
    browser.open_and_check(page, width)


def test_the_slider_follows_arrow_keys_and_the_pointer(browser, page):
    browser.open(page, 1280)
    at = "parseFloat(document.querySelector('#scene-0 .stage').style.getPropertyValue('--at'))"
    tags = "[...document.querySelectorAll('#scene-0 .stage .tag')].map(t => t.textContent).join()"
    assert browser.run(tags) == "Bicubic,tiny"
    browser.run("document.querySelector('#scene-0 .stage input').focus()")
    assert browser.run(at) == 50
    for _ in range(5):
        browser.key("ArrowRight")
    assert browser.run(at) == 55
    browser.run("document.querySelector('#scene-0 .stage').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = "(b => [b.left, b.top, b.width, b.height])(document.querySelector('#scene-0 .stage').getBoundingClientRect())"
    left, top, width, height = browser.run(box)
    browser.mouse("mousePressed", left + width * 0.3, top + height / 2)
    browser.mouse("mouseMoved", left + width * 0.8, top + height / 2)
    browser.mouse("mouseReleased", left + width * 0.8, top + height / 2)
    assert browser.run(at) == pytest.approx(80, abs=1)
    # What is left of the bar is the left version: the picture above is cut off where the bar stands.
    assert "20%" in browser.run("getComputedStyle(document.querySelector('#scene-0 img.before')).clipPath")


def test_another_version_can_be_chosen(browser, page):
    browser.open(page, 1280)
    browser.run(
        "(s => { s.value = 'HR'; s.dispatchEvent(new Event('change')); })"
        "(document.querySelector('#scene-1 select[data-side=after]'))"
    )
    same = "document.querySelector('#scene-1 img.after').src == document.querySelector('#scene-1 [data-label=HR]').src"
    assert browser.run(same)


def test_close_ups_of_a_scene_move_together(browser, page):
    browser.open(page, 1280)
    places = "[...document.querySelectorAll('#scene-0 .tile img')].map(i => i.style.left + i.style.top + i.style.width)"
    before = browser.run(places)
    assert len(set(before)) == 1
    browser.run("document.querySelector('#scene-0 .window').focus()")
    for _ in range(3):
        browser.key("ArrowLeft")
        browser.key("ArrowUp")
    moved = browser.run(places)
    assert len(set(moved)) == 1
    assert moved != before
    browser.run(
        "(z => { z.value = 6; z.dispatchEvent(new Event('input')); })(document.querySelector('#scene-0 .zoom input'))"
    )
    assert browser.run("document.querySelector('#scene-0 .tile img').style.width") == "600%"
