"""Claims about the table of methods on real pairs."""

import json
import sys
from importlib.util import find_spec

import cv2
import pytest
from small_networks import make_pipeline

from benchmarks import peers

pytestmark = pytest.mark.usefixtures("own_store")
DISTANCE = ["--distance"] * bool(find_spec("efficientnet_lite_pytorch"))  # of an extra


@pytest.fixture
def test_set(photos, tmp_path):
    """Five pairs, 64 and 16 px a side, and pictures of a peer, named as in OSEDiff's repository."""
    photo = cv2.imread(str(photos / "train" / "life.jpg"))
    for number in range(5):
        hr = photo[100:164, 100 * number : 100 * number + 64]
        lr = cv2.resize(hr, (16, 16), interpolation=cv2.INTER_AREA)
        name = f"Canon_00{number}"
        given = {"test_HR": hr, "test_LR": lr, "results_peer": cv2.blur(hr, (3, 3))}
        for folder, picture in given.items():
            (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
            mark = "HR" if folder == "test_HR" else "LR4"
            assert cv2.imwrite(str(tmp_path / "set" / folder / f"{name}_{mark}.png"), picture)
    make_pipeline(num_inference_steps=1).save_pretrained(tmp_path / "small")
    return tmp_path / "set"


def test_one_command_makes_the_table_of_several_models_and_continues(test_set, tmp_path, monkeypatch, capsys):
    def table(*words: str) -> dict:
        given = ["--out", tmp_path / "out", "--model", f"ours={tmp_path / 'small'}", "--model", tmp_path / "small"]
        monkeypatch.setattr(sys, "argv", [*map(str, ["peers", test_set, *given, "--every", 2, *words])])
        assert peers.main() == 0
        return json.loads((tmp_path / "out" / "evaluation" / "results.json").read_text())

    few = ("--methods", "ours", "peer", "bicubic")
    first = table(*few, *DISTANCE)
    assert list(first["metrics"]) == ["ours", "peer", "bicubic"]
    assert list(first["definitions"]) == ["psnr", "ssim", "niqe", *[peers.DISTANCE for _ in DISTANCE]]
    assert [sample["key"] for sample in first["samples"]] == ["Canon_000_HR", "Canon_002_HR", "Canon_004_HR"]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "ours").iterdir()}
    assert len(made) == 3
    capsys.readouterr()
    assert table(*few, *DISTANCE) == first
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*told["models"]] == ["ours"]
    assert len(told["models"]["ours"]["digest"]) == 64
    both = table("--methods", "ours", "small", "--seed", "1")
    assert list(both["metrics"]) == ["ours", "small"]
    assert both["metrics"]["ours"] == both["metrics"]["small"] != first["metrics"]["ours"]
    for words, message in {
        ("--methods", "theirs"): "no method theirs: there are tiny, RealESRGAN x4plus, peer, bicubic",
        ("--model", "runs/model"): "--model: model is the name of something else: give NAME=MODEL",
    }.items():
        monkeypatch.setattr(sys, "argv", ["peers", str(test_set), "--out", str(tmp_path), *words])
        with pytest.raises(SystemExit):
            peers.main()
        assert message in capsys.readouterr().err
