"""What a run of these tests takes of the disk."""

import os
import subprocess
import sys
from pathlib import Path


def pytest_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TMPDIR": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-o", "timeout=", *arguments]
    return subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)


def test_a_full_disk_ends_the_run_at_once_with_the_remedy(small_disk):
    result = pytest_run(small_disk, "tests/test_layers.py")
    assert result.returncode == 2
    assert f"error: the tests need 2 GiB in {small_disk}, 0.0 are free: free some, or set TMPDIR" in result.stdout
    assert "passed" not in result.stdout


def test_a_run_that_passes_leaves_nothing(tmp_path):
    result = pytest_run(tmp_path, "tests/test_recipe.py")
    assert result.returncode == 0, result.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
