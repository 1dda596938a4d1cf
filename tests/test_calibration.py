"""Claims about the comparison with a published log, on pictures and a log that the tests make."""

import json
import sys
from pathlib import Path

import cv2
import plain_metrics
import pytest
from plain_metrics import made_picture, softened

from benchmarks import calibration
from deedsr.metrics.niqe import _parameters

NAMES = ("Canon_001_LR4.png", "Nikon_002_LR4.png")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A test set with a log of the plain transcriptions, as OSEDiff's repository has it; `write(psnr)` changes one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # no weights of anybody
    results = tmp_path / "set" / "results_peer"
    for folder in (results / "metrics", tmp_path / "set" / "test_HR"):
        folder.mkdir(parents=True)
    rows = []
    for seed, name in enumerate(NAMES):
        reference = made_picture(seed)
        picture = softened(reference)
        cv2.imwrite(str(results / name), picture[..., ::-1])
        cv2.imwrite(str(tmp_path / "set" / "test_HR" / name), reference[..., ::-1])
        niqe = plain_metrics.niqe(picture, _parameters()["mu_pris_param"][0], _parameters()["cov_pris_param"])
        rows.append([plain_metrics.psnr(picture, reference), plain_metrics.ssim(picture, reference), niqe])

    def write(shift: float = 0.0) -> str:
        told = [(psnr + shift, ssim, niqe) for psnr, ssim, niqe in rows]
        lines = ["24-10-23 17:28:54.191 - INFO:   inp_imgs: ['a/results_peer']"]
        for name, row in zip(NAMES, told, strict=True):
            figures = "PSNR: {:.6f}; SSIM: {:.6f}; LPIPS: 0.224819; NIQE: {:.6f}; MUSIQ: 75.3".format(*row)
            lines.append(f"24-10-23 17:29:03.278 - INFO: results_peer/{name} | {figures} | Runtime: 1.06 sec")
        means = [sum(column) / len(told) for column in zip(*told, strict=True)]
        figures = "PSNR: {:.4f}; SSIM: {:.4f}; LPIPS: 0.2921; NIQE: {:.4f}; MUSIQ: 69.0896".format(*means)
        lines += ["===== Average Metrics =====", f"{figures} | FID: 123.493817 | FID Runtime: 6.79 sec"]
        (results / "metrics" / "test.log").write_text("\n".join(lines))
        return str(tmp_path)

    return write


def calibrated(folder: str, monkeypatch, capsys) -> tuple[int, str, dict]:
    monkeypatch.setattr(sys, "argv", ["calibration", folder])
    code = 0
    try:
        calibration.main()
    except SystemExit as error:
        code = int(error.code or 0)
    text = capsys.readouterr().out
    return code, text, json.loads(text.splitlines()[-1])


def test_what_can_be_compared_agrees_and_the_rest_is_named(published, monkeypatch, capsys):
    code, text, found = calibrated(published(), monkeypatch, capsys)
    assert code == 0
    table = found["sets"]["set/results_peer"]
    assert {name: (row["figures"], row["within"]) for name, row in table.items()} == dict.fromkeys(
        ("PSNR", "SSIM", "NIQE"), (2, True)
    )
    assert table["PSNR"]["mean"] == pytest.approx(table["PSNR"]["logged"], abs=1e-4)
    assert set(found["not compared"]) == {"LPIPS", "DISTS", "FID", "CLIPIQA", "MUSIQ", "MANIQA"}
    assert "LPIPS could not be compared: lpips needs alexnet-owt-7be5be79.pth" in text
    (log,) = Path(published()).rglob("*.log")
    assert calibration.read_log(log).means["FID"] == 123.493817


def test_a_log_of_other_figures_ends_with_1(published, monkeypatch, capsys):
    code, text, found = calibrated(published(shift=2e-4), monkeypatch, capsys)
    assert code == 1
    assert not found["sets"]["set/results_peer"]["PSNR"]["within"]
    assert "differs" in text


def test_a_folder_without_logs_or_pictures_is_named(published, monkeypatch, tmp_path):
    folder = published()
    (tmp_path / "set" / "test_HR" / NAMES[1]).unlink()
    monkeypatch.setattr(sys, "argv", ["calibration", folder])
    with pytest.raises(SystemExit, match=f"{NAMES[1]} is missing or no picture"):
        calibration.main()
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["calibration", str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match="holds no results_NAME/metrics"):
        calibration.main()
