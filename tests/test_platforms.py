"""Systems that lack what Linux has: the same commands in a process without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

ROOT = Path(__file__).parent.parent
# macOS has no scheduler affinity; Windows has none of the POSIX modules and calls either.
LACKING = {
    "macos": {"os": ["sched_getaffinity", "sched_setaffinity", "posix_fadvise"], "modules": []},
    "windows": {
        "os": ["sched_getaffinity", "sched_setaffinity", "posix_fadvise", "pread", "fchmod"],
        "modules": ["fcntl", "termios", "syslog"],  # those that third parties on Linux do without
    },
}
WITHOUT = """
import json, os, sys
lacking = json.loads(sys.argv.pop(1))
for name in lacking["os"]:
    if hasattr(os, name):
        delattr(os, name)
for name in lacking["modules"]:
    sys.modules[name] = None
from jobs import cli
cli.set_up_process()
raise SystemExit(cli.main(sys.argv[1:]))
"""


def run(system: str, *words: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(LACKING[system]), *words, "--json"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def picture(tmp_path_factory, lr) -> Path:
    path = tmp_path_factory.mktemp("platforms") / "picture.png"
    cv2.imwrite(str(path), lr)
    return path


def test_every_picture_comes_out_where_windows_lacks_posix(picture, tmp_path):
    result = run("windows", "upscale", str(picture), "--out", str(tmp_path), "--steps", "2")
    assert [Path(image["output"]).is_file() for image in result["images"]] == [True]
    assert result["failed"] == []


@pytest.mark.soak
def test_shards_evaluation_and_upscaling_run_where_macos_lacks_affinity(picture, photos, small_recipe, tmp_path):
    recipe = tmp_path / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps(small_recipe.model_dump(mode="json")))
    shards = run("macos", "shards", "--source", str(photos), "--out", str(tmp_path / "shards"), "--recipe", str(recipe),
                 "--tracking", "false")  # fmt: skip
    assert shards["samples"] == 136
    words = ("--model", "tiny", "--steps", "2")
    result = run("macos", "evaluate", *words, "--data", str(tmp_path / "shards"), "--out", str(tmp_path / "evaluation"),
                 "--limit", "1", "--metrics", "psnr")  # fmt: skip
    assert result["samples"] == 1
    assert run("macos", "upscale", str(picture), *words, "--out", str(tmp_path / "upscaled"))["failed"] == []


def test_nothing_but_one_module_uses_what_some_systems_lack():
    import re

    lacking = r"\b(import (fcntl|pwd|grp|resource|termios|msvcrt)|os\.(sched_\w+|fork|getuid|geteuid))\b"
    product = [path for folder in ("deedsr", "pipelines", "jobs") for path in (ROOT / folder).rglob("*.py")]
    found = [path.name for path in product if re.search(lacking, path.read_text())]
    assert found == ["machine.py"]
