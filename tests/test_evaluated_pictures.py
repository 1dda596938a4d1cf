"""Claims about evaluations of picture files: matched by name, measured side by side, bad ones listed."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet
import pytest
from evaluations import assert_same, evaluate
from packages import install
from small_networks import make_pipeline

from deedsr.errors import DeeDSRError, UsageError
from deedsr.metrics import psnr_y, ssim_y
from jobs.cli import main
from pipelines.data.dataset import Dataset
from pipelines.inference.parts import files_given

pytestmark = pytest.mark.usefixtures("own_store")
NAMES = ("Canon_001", "Canon_002", "Nikon_003", "Nikon_004")


def read(path: Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def save(folder: Path, name: str, picture: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    assert cv2.imwrite(str(folder / name), picture[..., ::-1] if picture.ndim == 3 else picture)


@pytest.fixture(scope="module")
def hrs(photos) -> list[np.ndarray]:
    """Crops of shipped photographs, uint8 RGB (64, 64, 3)."""
    paths = sorted((photos / "train").glob("*.jpg"))[: len(NAMES)]
    return [np.ascontiguousarray(cv2.imread(str(path))[200:264, 300:364, ::-1]) for path in paths]


@pytest.fixture
def folders(hrs, tmp_path) -> Path:
    """hr, lr as RealSR calls them, and two methods: `soft` (blurred by 3 pixels) and `softer` (by 7)."""
    for name, hr in zip(NAMES, hrs, strict=True):
        save(tmp_path / "hr", f"{name}_HR.png", hr)
        save(tmp_path / "lr", f"{name}_LR4.png", cv2.resize(hr, (16, 16), interpolation=cv2.INTER_AREA))
        save(tmp_path / "soft", f"{name}_LR4.png", cv2.blur(hr, (3, 3)))
        save(tmp_path / "softer", f"{name}.png", cv2.blur(hr, (7, 7)))
    return tmp_path


def measured(folders: Path, **options):
    names = ("soft", "softer")
    given = {"pictures": [f"{name}={folders / name}" for name in names], "reference": str(folders / "hr")}
    return evaluate(None, None, str(folders / "out"), progress=False, **given | {"metrics": ("psnr", "ssim")} | options)


def test_anybodys_pictures_are_measured_against_references_of_matching_names(folders, hrs):
    result = measured(folders)
    assert (result.samples, result.rejected, list(result.metrics)) == (4, {}, ["soft", "softer"])
    for method, side in {"soft": 3, "softer": 7}.items():
        for name, measure in {"psnr": psnr_y, "ssim": ssim_y}.items():
            values = [measure(cv2.blur(hr, (side, side)), hr) for hr in hrs]
            figure = result.metrics[method][name]
            assert figure["mean"] == pytest.approx(np.mean(values))
            assert min(values) <= figure["low"] < figure["mean"] < figure["high"] <= max(values)
    [psnr, ssim] = result.differences
    assert (psnr["metric"], psnr["method"], psnr["other"], psnr["wins"]) == ("psnr", "soft", "softer", 1)
    assert psnr["mean"] == pytest.approx(
        result.metrics["soft"]["psnr"]["mean"] - result.metrics["softer"]["psnr"]["mean"]
    )
    assert ssim["low"] > 0


def test_every_picture_and_metric_has_a_row(folders, hrs):
    measured(folders)
    rows = pyarrow.parquet.read_table(folders / "out" / "rows.parquet").to_pylist()
    assert len(rows) == 4 * 2 * 2
    value = {(row["picture"], row["method"], row["metric"]): row["value"] for row in rows}
    assert value["Canon_002_HR", "softer", "psnr"] == pytest.approx(psnr_y(cv2.blur(hrs[1], (7, 7)), hrs[1]))
    results = json.loads((folders / "out" / "results.json").read_text())
    assert results["samples"][1]["metrics"]["softer"]["psnr"] == value["Canon_002_HR", "softer", "psnr"]
    assert results["samples"][1]["pictures"]["softer"] == str(folders / "softer" / "Canon_002.png")
    assert not (folders / "out" / "pictures").exists()  # none was made


def test_it_continues_with_what_is_missing_or_changed(folders, hrs):
    first = measured(folders)
    records = {path.name: path.stat().st_mtime_ns for path in (folders / "out").glob("_state/evaluation/*/*.json")}
    assert measured(folders) == first
    save(folders / "soft", "Canon_001_LR4.png", cv2.blur(hrs[0], (5, 5)))
    changed = measured(folders)
    after = {path.name: path.stat().st_mtime_ns for path in (folders / "out").glob("_state/evaluation/*/*.json")}
    assert [name for name in records if after[name] != records[name]] == ["Canon_001_HR.json"]
    assert changed.metrics["soft"]["psnr"]["mean"] < first.metrics["soft"]["psnr"]["mean"]
    assert changed.metrics["softer"] == first.metrics["softer"]
    assert changed.run_id != first.run_id  # whose figures stay true


def test_without_references_only_metrics_that_need_none_are_computed(folders, photos):
    photo = cv2.imread(str(photos / "train" / "life.jpg"))[:512, :512, ::-1]
    save(folders / "large", "a.png", photo)
    result = measured(folders, pictures=[str(folders / "large")], reference=None, metrics=None)
    assert {name: set(found) for name, found in result.metrics.items()} == {"large": {"niqe", "niqe_set"}}
    assert result.metrics["large"]["niqe"]["mean"] > 0
    with pytest.raises(UsageError, match="psnr needs references: give --reference"):
        measured(folders, pictures=[str(folders / "soft")], reference=None, metrics=("psnr",))


def test_marks_of_test_sets_count_in_every_folder(folders):
    place = lambda name: f"{name}={folders / name}"
    for pictures in (["soft", "softer"], ["softer", "soft"]):
        result = measured(folders, pictures=[*map(place, pictures)], reference=None, metrics=("niqe",))
        assert (result.samples, result.rejected) == (4, {})


def test_given_pictures_stand_beside_samples_of_a_dataset(folders, small_dataset):
    out = folders / "samples"
    dataset = Dataset.open(small_dataset)
    for number, key in enumerate(dataset.index("validation")["key"].to_pylist()):
        if number:
            hr = dataset.read(dataset.index("validation"), number).hr
            save(folders / "theirs", f"{key}{'.lr' if number % 2 else ''}.png", cv2.blur(hr, (3, 3)))
    given = {"pictures": [f"theirs={folders / 'theirs'}"], "metrics": ("psnr",), "progress": False}
    result = evaluate(None, small_dataset, str(out), **given)
    assert list(result.metrics) == ["theirs", "bicubic"]
    assert (result.samples, list(result.rejected.values())) == (number, ["no picture of theirs"])
    assert result.dataset_digest == dataset.digest
    assert evaluate(None, small_dataset, str(out), **given) == result


def test_a_model_and_bicubic_stand_beside_given_pictures(folders, tmp_path_factory):
    model = tmp_path_factory.mktemp("models") / "small"
    make_pipeline(num_inference_steps=1).save_pretrained(model)
    place = {"out": str(folders / "both"), "data": str(folders / "lr"), "metrics": ("psnr",), "progress": False}
    pictures = [f"soft={folders / 'soft'}"]
    result = evaluate(str(model), reference=str(folders / "hr"), pictures=pictures, **place)
    assert list(result.metrics) == ["model", "soft", "bicubic"]
    assert [(one["method"], one["other"]) for one in result.differences] == [
        ("model", "soft"), ("model", "bicubic"), ("soft", "bicubic"),
    ]  # fmt: skip
    made = folders / "both" / "pictures"
    assert sorted(path.name for path in made.iterdir())[:2] == ["Canon_001_HR.bicubic.png", "Canon_001_HR.model.png"]
    lr, hr = read(folders / "lr" / "Canon_001_LR4.png"), read(folders / "hr" / "Canon_001_HR.png")
    bicubic = cv2.resize(lr, (64, 64), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_array_equal(read(made / "Canon_001_HR.bicubic.png"), bicubic)
    page = (folders / "both" / "evaluation.html").read_text()
    assert "small minus that of soft" in page
    assert page.count('class="scene') == 4
    half = evaluate(str(model), reference=str(folders / "hr"), precision="bf16", **place)
    assert json.loads(Path(half.results).read_text())["precision"] == "bf16"
    assert half.metrics["model"]["psnr"] != result.metrics["model"]["psnr"]
    alone = evaluate(str(model), **place | {"metrics": ("niqe",)})
    assert (list(alone.metrics), alone.samples) == (["model", "bicubic"], 4)
    assert hr.shape == (64, 64, 3)


def test_pictures_that_cannot_be_measured_are_listed_and_left_out_for_all(folders, hrs, capsys):
    (folders / "softer" / "Canon_001.png").unlink()
    save(folders / "soft", "Canon_002_LR4.png", hrs[1][:60])
    save(folders / "soft", "Nikon_003_LR4.png", hrs[2].astype(np.uint16) * 257)
    words = ["evaluate", "--pictures", *(f"{name}={folders / name}" for name in ("soft", "softer"))]
    words += ["--reference", str(folders / "hr"), "--out", str(folders / "out"), "--metrics", "psnr"]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "PSNR-Y dB ↑" in said
    for reason in (
        "Canon_001_HR: no picture of softer",
        "Canon_002_HR: soft is 64x60, the reference 64x64",
        "Nikon_003_HR: Nikon_003_LR4.png: 16 bits a channel, and metrics are defined for 8",
    ):
        assert f"rejected {reason}" in said
    assert main([*words, "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert (values["samples"], len(values["rejected"])) == (1, 3)
    assert values["metrics"]["soft"]["psnr"]["mean"] == pytest.approx(psnr_y(cv2.blur(hrs[3], (3, 3)), hrs[3]))


def test_what_cannot_be_evaluated_is_one_clear_error(folders, small_dataset):
    (folders / "empty").mkdir()
    save(folders / "others", "house.png", np.zeros((64, 64, 3), np.uint8))
    save(folders / "twice", "a.png", np.zeros((64, 64, 3), np.uint8))
    save(folders / "twice", "a.jpg", np.zeros((64, 64, 3), np.uint8))
    place = lambda name: str(folders / name)
    for message, options in (
        ("empty holds no pictures", {"pictures": [place("empty")]}),
        ("empty holds no pictures", {"reference": place("empty")}),
        ("nowhere does not exist", {"pictures": [place("nowhere")]}),
        (r"--pictures: no picture of .*others has the name of an HR", {"pictures": [place("others")]}),
        ("gives soft twice", {"pictures": [place("soft"), f"soft={place('softer')}"]}),
        ("give NAME=FOLDER", {"pictures": [f"hr={place('soft')}"]}),
        ("give NAME=FOLDER", {"pictures": [f"a:b={place('soft')}"]}),
        ("two pictures called a", {"pictures": [place("twice")], "reference": None, "metrics": None}),
        ("nothing to evaluate", {"pictures": []}),
        ("a dataset, which holds its HR pictures: leave out --reference", {"data": small_dataset}),
        ("is a dataset, and nothing enlarges it", {"data": small_dataset, "pictures": [], "reference": None}),
        ("no picture of .*soft has the name", {"data": small_dataset, "reference": None}),
        ("holds LR pictures: give --model", {"data": place("lr"), "reference": None}),
        ("--data: no picture of .*others", {"data": place("others")}),
        ("no picture of .*hr could be measured, such as .*lr is 16x16", {"pictures": [f"lr2={place('lr')}"]}),
    ):  # fmt: skip
        given = {"pictures": [place("soft")], "reference": place("hr"), "metrics": ("psnr",)} | options
        with pytest.raises(UsageError, match=message.replace("lr is", "lr2 is")):
            evaluate(None, given.pop("data", None), place("out"), progress=False, **given)
    assert not (folders / "out" / "results.json").exists()
    with pytest.raises(UsageError, match="--model tiny needs --data"):
        evaluate("tiny", None, place("out"))


CONTRAST = """
import numpy as np
from deedsr.metrics.metric import Metric

class Contrast(Metric):
    name, title, definition, source = "contrast:log", "Contrast", "log of the deviation, mean over pictures", "a test"
    higher_is_better, needs_reference = True, False

    def measure(self, picture, reference):
        with np.errstate(divide="ignore"):
            return float(np.log(picture.std()))

class Broken(Contrast):
    def measure(self, picture, reference):
        raise RuntimeError("no such layer")

class Unprepared(Contrast):
    def prepare(self):
        raise RuntimeError("no memory")

class Wordy(Contrast):
    def measure(self, picture, reference):
        return "much"

def provider(name, setting):
    return {"log": Contrast, "broken": Broken, "wordy": Wordy, "unprepared": Unprepared}[name](setting)
"""


def test_a_value_that_is_no_number_is_null_and_its_method_has_no_mean(folders, tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    install(tmp_path / "packages", "contrast_metric", CONTRAST, "[deedsr.metrics]\ncontrast = contrast_metric:provider")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "contrast_metric", raising=False)
    save(folders / "soft", "Nikon_003_LR4.png", np.zeros((64, 64, 3), np.uint8))
    result = measured(folders, metrics=("contrast:log", "psnr"))
    assert result.metrics["soft"]["contrast:log"] == {"mean": None, "low": None, "high": None}
    assert result.metrics["softer"]["contrast:log"]["mean"] > 0
    assert [one["metric"] for one in result.differences] == ["psnr"]
    samples = json.loads((folders / "out" / "results.json").read_text())["samples"]
    values = [sample["metrics"]["soft"]["contrast:log"] for sample in samples]
    assert [value is None for value in values] == [False, False, True, False]
    assert (result.samples, result.rejected) == (4, {})
    reasons = {"broken": "RuntimeError: no such layer", "wordy": "TypeError", "unprepared": "RuntimeError: no memory"}
    for name, reason in reasons.items():
        with pytest.raises(DeeDSRError, match=f"^contrast:{name} failed: {reason}"):
            measured(folders, metrics=(f"contrast:{name}",))


def test_names_of_drealsr_and_of_outputs_fit(tmp_path, hrs):
    for folder, name in {"hr": "DSC_1_x1.png", "a": "DSC_1_x1.png", "b": "DSC_1_x4.png", "c": "DSC_1.jpg"}.items():
        save(tmp_path / folder, name, hrs[0])
    given = files_given(None, str(tmp_path / "hr"), [str(tmp_path / name) for name in "abc"], None, None)
    [part] = given.parts
    assert {name: Path(uri).name for name, uri in part.files.items()} == {
        "hr": "DSC_1_x1.png", "a": "DSC_1_x1.png", "b": "DSC_1_x4.png", "c": "DSC_1.jpg",
    }  # fmt: skip


@pytest.mark.soak
def test_a_cluster_measures_the_same(on_cluster, folders):
    measured(folders)
    (folders / "out").rename(folders / "cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS")
        measured(folders)
    assert_same(folders / "out", folders / "cluster")
