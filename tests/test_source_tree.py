"""A source tree that is not installed, as a job's working directory is, runs the commands."""

import subprocess
import sys
from pathlib import Path

import deedsr

ROOT = Path(__file__).parent.parent
HIDDEN = """
import importlib.metadata as metadata, runpy, sys
found = metadata.version
def version(name):
    if name == "deedsr":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
sys.argv = ["deedsr", "--version"]
runpy.run_module("deedsr", run_name="__main__")
"""


def test_it_knows_its_version_and_runs():
    done = subprocess.run([sys.executable, "-c", HIDDEN], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == deedsr.__version__
