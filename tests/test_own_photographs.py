"""docs/own-photographs.md: every command as it stands there, on the shipped photographs."""

import json
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
from ray_head import ROOT

PAGE = (ROOT / "docs/own-photographs.md").read_text()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_model_fine_tuned_from_tiny_is_not_worse_on_photographs_of_its_kind(photos, tmp_path):
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "own.yaml").write_text(recipe)
    picture = cv2.imread(str(photos / "validation" / "Green-Maple.jpg"))
    cv2.imwrite(str(tmp_path / "photo.jpg"), picture[:160, :160])
    (block,) = re.findall(r"```\n(deedsr .*?)```", PAGE, re.DOTALL)
    commands = [line.split("#")[0].split() for line in block.replace("\\\n", " ").splitlines()]
    for words in commands:
        given = [str(photos) if word == "PHOTOS" else word for word in words[1:]]
        subprocess.run([sys.executable, "-m", "deedsr", *given], cwd=tmp_path, check=True)
    before, after = (json.loads((tmp_path / f"own/{name}/results.json").read_text()) for name in ("before", "after"))
    assert after["sampling"] == before["sampling"]
    psnr = [{row["key"]: row["metrics"]["model"]["psnr"] for row in results["samples"]} for results in (before, after)]
    assert psnr[0].keys() == psnr[1].keys()
    gains = np.array([psnr[1][key] - psnr[0][key] for key in psnr[0]])
    assert gains.mean() > 0
    assert "before" in (tmp_path / "own/before-after.html").read_text()
    assert list((tmp_path / "upscaled").glob("photo*"))
