"""Real pairs: partners are found as the public datasets name them, and held as they are."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from source_files import made, put, rejected, run, tar_of

from deedsr.dataset.members import decode_stored
from deedsr.dataset.pictures import decode
from deedsr.dataset.recipe import load_recipe
from deedsr.errors import UsageError
from jobs.cli import main
from pipelines.data.dataset import Dataset
from pipelines.shards import hr_job, verify
from pipelines.shards.duplicates import mark_duplicates
from pipelines.shards.listing import list_pairs
from pipelines.shards.samples import samples_of
from pipelines.shards.source import Source, read_source


def pair_files(pictures, hr: str, lr: str, scale: int = 4) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """HR and LR files of three pictures, called by the patterns; the HR is up to three pixels more than whole."""
    hrs, lrs = {}, {}
    for number, data in enumerate(list(pictures.values())[:3], start=1):
        image = cv2.cvtColor(decode(data), cv2.COLOR_RGB2BGR)
        image = image[: image.shape[0] // 4 * 4 - 4 + number, : 236 + number]
        size = (image.shape[1] // scale, image.shape[0] // scale)
        small = cv2.resize(image[: size[1] * scale, : size[0] * scale], size, interpolation=cv2.INTER_AREA)
        for files, pattern, pixels in ((hrs, hr, image), (lrs, lr, small)):
            name = pattern.format(number)
            files[name] = cv2.imencode(Path(name).suffix, pixels)[1].tobytes()
    return hrs, lrs


LAYOUTS = {
    "RealSR": ("Canon_{:03d}_HR.png", "Canon_{:03d}_LR4.png"),
    "DRealSR": ("train_HR/DSC_{:04d}_x1.png", "train_LR/DSC_{:04d}_x4.png"),
    "DIV2K": ("{:04d}.png", "X4/{:04d}x4.png"),
    "equal names": ("scene{}/shot_x2.png", "scene{}/shot_x2.png"),
    "other extension": ("{}.webp", "{}.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_matched_as_the_datasets_come(tmp_path, pictures, layout):
    hrs, lrs = pair_files(pictures, *LAYOUTS[layout])
    sources = list(list_pairs([put(hrs, tmp_path / "hr")], [put(lrs, tmp_path / "lr")], 4))
    assert [s.path for s in sources] == sorted(hrs)
    assert [read_source(s) for s in sources] == [
        (hrs[hr], lrs[lr]) for hr, lr in zip(sorted(hrs), sorted(lrs), strict=True)
    ]


def test_pairs_of_one_folder_and_of_other_scales_are_told_apart_by_their_marks(tmp_path, pictures):
    hrs, lrs = pair_files(pictures, *LAYOUTS["RealSR"])
    others = {name.replace("LR4", "LR2"): b"x" for name in lrs}
    folder = put(hrs | lrs | others, tmp_path / "all")
    sources = list(list_pairs([folder], [folder], 4))
    assert [read_source(s) for s in sources] == list(zip(hrs.values(), lrs.values(), strict=True))
    inner = put({f"LR/{name}": data for name, data in lrs.items()} | hrs, tmp_path / "nested")
    sources = list(list_pairs([inner], [f"{inner}/LR"], 4))
    assert [read_source(s) for s in sources] == list(zip(hrs.values(), lrs.values(), strict=True))


def test_partners_in_the_same_folder_come_before_those_elsewhere(tmp_path, pictures):
    hrs, lrs = pair_files(pictures, *LAYOUTS["equal names"])
    again = {name.replace("scene", "other"): data for name, data in hrs.items()}
    sources = list(list_pairs([put(hrs | again, tmp_path / "hr")], [put(lrs, tmp_path / "lr")], 4))
    assert {s.path: s.problem for s in sources} == dict.fromkeys(hrs, "") | dict.fromkeys(again, "no LR partner")


def test_names_that_fit_several_pictures_or_none_are_one_clear_error(tmp_path, pictures):
    hrs, lrs = pair_files(pictures, *LAYOUTS["DIV2K"])
    hr, lr = put(hrs, tmp_path / "hr"), put(lrs, tmp_path / "lr")
    with pytest.raises(UsageError, match="no picture of .*lr has the name of an HR picture, such as X4/0001x4.png for"):
        list(list_pairs([hr], [lr], 3))
    with pytest.raises(UsageError, match="one for each --source, not 2"):
        list(list_pairs([hr], [lr, lr], 4))
    with pytest.raises(UsageError, match=r"hr/0001.png and .*hr2/0001.png could both be the partner of .*0001x4.png"):
        list(list_pairs([hr, put(hrs, tmp_path / "hr2")], [lr], 4))
    put({"X4/0002x4d.png": b"x"}, lr)
    with pytest.raises(UsageError, match=r"0002x4.png and .*0002x4d.png could both be the partner of .*hr/0002.png"):
        list(list_pairs([hr], [lr], 4))
    put({"lr.tar": tar_of(lrs)}, tmp_path / "tars")
    with pytest.raises(UsageError, match=r"holds lr.tar: give folders"):
        list(list_pairs([hr], [str(tmp_path / "tars")], 4))


@pytest.mark.usefixtures("ray_cluster")
def test_a_dataset_of_real_pairs_holds_them_as_they_are(tmp_path, pictures, one_crop_recipe, caplog):
    hrs, lrs = pair_files(pictures, *LAYOUTS["DRealSR"])
    alone, wrong = hrs | {}, lrs | {}
    alone["train_HR/alone_x1.png"] = next(iter(hrs.values()))
    alone["train_HR/wrong_x1.png"] = next(iter(hrs.values()))
    wrong["train_LR/wrong_x4.png"] = next(iter(hrs.values()))
    wrong["train_LR/widow_x4.png"] = next(iter(lrs.values()))
    hr, lr, out = put(alone, tmp_path / "hr"), put(wrong, tmp_path / "lr"), tmp_path / "out"
    result = run([hr], out, one_crop_recipe, pairs=[lr])
    assert "1 of 5 pictures in" in caplog.text
    dataset = Dataset.open(str(out))
    assert (dataset.manifest.given, dataset.manifest.used, result.samples) == (5, 3, 3)
    assert rejected(out) == {
        "train_HR/alone_x1.png": "no LR partner",
        "train_HR/wrong_x1.png": "the LR partner is not HR size / scale",
    }
    index = dataset.index()
    for row in range(index.num_rows):
        sample = dataset.read(index, row)
        assert sample.info["degradation"] is None
        assert np.array_equal(sample.lr, dataset.read_lr(index, row)[1])
        top, left, size, _ = sample.info["crop"]
        name = sample.info["source"]["path"]
        partner = decode(lrs[name.replace("train_HR", "train_LR").replace("_x1", "_x4")])
        partner = partner[top // 4 : (top + size) // 4, left // 4 : (left + size) // 4]
        assert np.array_equal(sample.hr, turned(decode(hrs[name])[top : top + size, left : left + size], sample))
        assert np.array_equal(sample.lr, turned(partner, sample))
    checked = verify(str(out), replay=3, progress=False)
    assert (checked.ok, checked.samples, checked.problems) == (True, 3, [])
    # A partner that changes makes its shard anew, and one that comes turns a rejected picture into a used one.
    inverted = cv2.imencode(".png", 255 - decode(lrs["train_LR/DSC_0001_x4.png"]))[1].tobytes()
    put({"train_LR/alone_x4.png": next(iter(lrs.values())), "train_LR/DSC_0001_x4.png": inverted}, lr)
    before = lr_of(out, "train_HR/DSC_0001_x1.png")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(one_crop_recipe.model_dump(mode="json")))
    words = ["shards", "--tracking", "false", "--pairs", lr, "--out", str(out)]
    assert main([*words, "--source", hr, "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    assert rejected(out) == {"train_HR/wrong_x1.png": "the LR partner is not HR size / scale"}
    assert np.array_equal(lr_of(out, "train_HR/DSC_0001_x1.png"), 255 - before[..., ::-1])
    assert main(words) == 2
    # The HR of real pairs may be degraded anew.
    anew = made(hr_job(str(out), str(tmp_path / "anew"), one_crop_recipe))
    assert anew.samples == Dataset.open(str(out)).manifest.samples == 4
    assert verify(str(tmp_path / "anew"), replay=4, progress=False).replayed == 4
    # Without partners the same pictures are degraded, the rejected ones among them.
    assert (run([hr], out, one_crop_recipe).samples, rejected(out)) == (5, {})


def lr_of(out, path: str) -> np.ndarray:
    index = Dataset.open(str(out)).index()
    return Dataset.open(str(out)).read(index, index["source"].to_pylist().index(path)).lr


def turned(pixels: np.ndarray, sample) -> np.ndarray:
    return pixels[:, ::-1] if sample.info["flip"] else pixels


def test_pairs_with_equal_hr_and_another_lr_are_no_duplicates(tmp_path, pictures):
    hr, lr, other = list(pictures.values())[:3]
    put({"a.png": hr, "b.png": hr, "c.png": hr}, tmp_path / "hr")
    put({"a.png": lr, "b.png": other, "c.png": lr}, tmp_path / "lr")
    sources = list_pairs([str(tmp_path / "hr")], [str(tmp_path / "lr")], 4)
    assert [s.path for s in mark_duplicates(sources, None) if s.duplicate] == ["c.png"]


def test_the_recipe_of_benchmarks_keeps_every_pair_as_it_is():
    """Smooth ones too, unflipped, all for validation, with the crop in the middle of what is larger."""
    recipe = load_recipe("benchmark")
    for side, grey in [(512, 200), (519, None)]:
        hr = (
            np.full((side, side, 3), 200, np.uint8)
            if grey
            else np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)
        )
        lr = cv2.resize(hr[: side // 4 * 4, : side // 4 * 4], None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        source = Source(0, "a_HR.png", "a_HR.png", 1, "1", lr="a_LR4.png")
        data, lr_data = (cv2.imencode(".png", pixels[..., ::-1])[1].tobytes() for pixels in (hr, lr))
        drafts = samples_of(source, data, lr_data, recipe)
        [sample], rejected = drafts.samples, drafts.rejected
        assert rejected == []
        assert (decode_stored(sample.members["lr"]) == lr[:128, :128]).all()
        assert (decode_stored(sample.members["hr"]) == hr[:512, :512]).all()
    assert recipe.split.validation_patterns == ("*",)
