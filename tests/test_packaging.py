"""What is declared is what is imported; the wheel installs alone and enlarges a picture without the pipeline."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import cv2
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jobs import cli
from pipelines.shards import assemble

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = [Requirement(line) for line in PROJECT["dependencies"]]
PIPELINE = [Requirement(line) for line in PROJECT["optional-dependencies"]["pipeline"]]
PACKAGES = packages_distributions()


def names(requirements) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def modules(layer: str) -> set[str]:
    """Top-level modules of others that a layer imports anywhere."""
    found = set()
    for path in (ROOT / layer).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"deedsr", "pipelines", "jobs"}


def providers(module: str) -> set[str]:
    return {canonicalize_name(name) for name in PACKAGES[module]}


def test_what_is_imported_is_declared():
    assert [module for module in modules("deedsr") if not providers(module) & names(BASE)] == []
    product = modules("deedsr") | modules("pipelines") | modules("jobs")
    assert [module for module in product if not providers(module) & names(BASE + PIPELINE)] == []


def test_what_is_declared_is_imported():
    product = modules("deedsr") | modules("pipelines") | modules("jobs")
    provided = set().union(*map(providers, product))
    assert names(BASE + PIPELINE) - provided == set()
    assert {module for module in product if not providers(module) & names(BASE)} == cli.PIPELINE


def test_ranges_have_two_ends_and_those_of_the_shards_bytes_are_warned_of(caplog, monkeypatch):
    declared = {requirement.name: requirement.specifier for requirement in BASE + PIPELINE}
    assert [name for name, range in declared.items() if {end.operator for end in range} != {">=", "<"}] == []
    assemble.warn_of_versions()
    assert caplog.messages == []
    monkeypatch.setattr(assemble, "requires", lambda name: ["pillow<11.1,>=10", "numpy>=2", 'ray<2; extra == "x"'])
    assemble.warn_of_versions()
    [message] = caplog.messages
    assert re.search(r"pillow [\d.]+ is outside <11\.1,>=10", message)


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.stem)
def test_exact_versions_lie_in_the_ranges(lock):
    pins = dict(line.split("==") for line in lock.read_text().splitlines())
    for requirement in BASE + PIPELINE:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from jobs import cli
raise SystemExit(cli.main(sys.argv[1:]))
"""


# What the extra alone installs: torch and diffusers need the others too.
LACKING = ",".join(cli.PIPELINE - {"jinja2", "requests"})


def without_pipeline(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT, LACKING, *words], cwd=ROOT, capture_output=True, text=True)


def test_help_needs_no_pipeline():
    every = "[*map(str.split, cli.COMMANDS), []]"
    code = WITHOUT.replace("cli.main(sys.argv[1:])", f"any(cli.main([*words, '--help']) for words in {every})")
    done = subprocess.run(
        [sys.executable, "-c", code, ",".join(cli.PIPELINE)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(cli.COMMANDS) + 1


REFUSED = {
    "shards": "shards --source deedsr/assets/photos --out OUT",
    "verify": "verify OUT",
    "inspect": "inspect OUT",
    "train": "train learner --data OUT --out OUT",
    "evaluate": "evaluate --model tiny --data OUT --out OUT",
    "upscale": "upscale s3://bucket/picture.png --out OUT",
    "compare": "compare --out OUT/x.html",
    "submit": "submit jobs/shards.yaml --address http://127.0.0.1:1",
    "demo": "demo --out OUT",
}
# Exit code and log of each command, one after the other.
EACH = (
    WITHOUT.partition("from jobs")[0]
    + """
import contextlib, io, json
from jobs import cli
said = {}
for name, words in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as log:
        code = cli.main(words.split())
    said[name] = code, log.getvalue()
print(json.dumps(said))
"""
)


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """By name."""
    out = str(tmp_path_factory.mktemp("refused") / "out")
    words = json.dumps({name: line.replace("OUT", out) for name, line in REFUSED.items()})
    command = [sys.executable, "-c", EACH, LACKING, words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", REFUSED)
def test_a_command_without_the_pipeline_names_what_installs_it(name, refused):
    code, log = refused[name]
    assert code in (1, 2)
    last = log.strip().splitlines()[-1]
    assert last.startswith("error: this needs ")
    assert "pip install 'deedsr[pipeline]'" in last
    assert "Traceback" not in log


def test_doctor_without_the_pipeline_names_what_s3_and_a_cluster_need(tmp_path):
    done = without_pipeline("doctor", "--json", "--out", "s3://bucket/x", "--address", "http://127.0.0.1:9")
    assert done.returncode == 1, done.stderr
    remedies = {check["name"]: check["remedy"] for check in json.loads(done.stdout)["checks"] if not check["ok"]}
    assert remedies["storage"] == "this needs boto3: pip install 'deedsr[pipeline]'"
    assert remedies["cluster"] == "this needs ray: pip install 'deedsr[pipeline]'"


def test_the_wheel_in_an_environment_of_its_own_enlarges_a_picture_offline(lr, tmp_path):
    """Its dependencies are those of this process; the pipeline's are hidden."""
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "benchmarks"))
    quiet = {"capture_output": True, "text": True, "cwd": tmp_path}
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tmp_path / "source")]
    done = subprocess.run(build, **quiet)
    assert done.returncode == 0, done.stderr
    [wheel], [sdist] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert max(wheel.stat().st_size, sdist.stat().st_size) < 25e6
    with tarfile.open(sdist) as tar:  # and nothing that is no part of the package
        folders = {name.split("/")[1] for name in tar.getnames() if name.count("/") > 1}
    assert folders == {"deedsr", "pipelines", "jobs", "requirements", "deedsr.egg-info"}

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "own"], **quiet, check=True)
    python = tmp_path / "own" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, **quiet, check=True)
    cv2.imwrite(str(tmp_path / "picture.png"), lr)
    offline = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:1", "PYTHONPATH": sysconfig.get_path("purelib")}
    commands = {
        "upscale": "upscale picture.png --out upscaled --steps 2",
        "export": "export tiny --out exported",
    }
    command = [str(python), "-c", f"{EACH}import deedsr\nprint(deedsr.__file__)", LACKING, json.dumps(commands)]
    done = subprocess.run(command, **quiet, env=os.environ | offline)
    assert done.returncode == 0, done.stderr
    said, where = done.stdout.splitlines()
    assert {name: code for name, (code, _) in json.loads(said).items()} == {"upscale": 0, "export": 0}, said
    assert cv2.imread(str(tmp_path / "upscaled" / "picture.png")).shape == (144, 256, 3)
    assert Path(where).is_relative_to(tmp_path / "own")
