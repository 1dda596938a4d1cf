"""Imports point one way: jobs -> pipelines -> deedsr, and the method knows nothing of what runs it."""

import ast
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "deedsr": {"ray", "mlflow", "boto3", "botocore", "deepspeed", "pipelines", "jobs"},
    "pipelines": {"jobs"},
}
DOOR = ROOT / "deedsr" / "__main__.py"  # the command line is entered here, and only here


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside functions and by name."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add((node.module or "").split(".")[0] if not node.level else path.relative_to(ROOT).parts[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            packages |= {str(word.value).split(".")[0] for word in node.args if isinstance(word, ast.Constant)}
    return packages


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_no_layer_imports_what_stands_above_it(layer):
    files = [path for path in (ROOT / layer).rglob("*.py") if path != DOOR]
    assert files
    crossings = {str(path.relative_to(ROOT)): imported(path) & FORBIDDEN[layer] for path in files}
    assert {path: names for path, names in crossings.items() if names} == {}


def test_the_door_leads_to_the_command_line_and_nowhere_else():
    assert imported(DOOR) <= {"sys", "jobs"}


def imported_names(path: Path) -> set[tuple[str, str]]:
    """(module, name) of everything that a file imports anywhere, also inside functions and for types."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {(node.module or "", alias.name) for node in nodes for alias in node.names}


@pytest.mark.parametrize("of", ["files", "folders"])
def test_the_method_has_no_import_circle(of):
    """Of files, and of folders. The package's own `__init__` and `__main__` lead to all and are left out."""
    paths = [path for path in (ROOT / "deedsr").rglob("*.py") if path.parent.name != "deedsr" or path.stem[0] != "_"]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    known, graph = set(names.values()), defaultdict(set)
    short = (lambda name: name) if of == "files" else lambda name: ".".join(name.split(".")[:2])
    for path, name in names.items():
        for module, part in imported_names(path):
            target = f"{module}.{part}" if f"{module}.{part}" in known else module
            if target in known and short(target) != short(name):
                graph[short(name)].add(short(target))
    assert len(graph) > 5
    while settled := [name for name, found in graph.items() if not found & graph.keys()]:
        for name in settled:
            del graph[name]
    assert graph == {}


def test_no_tracked_text_postpones_work():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    marks = ("TO" + "DO", "FIX" + "ME")
    found = []
    for name in filter(None, listed.split("\0")):
        try:
            text = (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError):  # a picture, or deleted in the working tree
            continue
        found += [name for mark in marks if mark in text]
    assert found == []
