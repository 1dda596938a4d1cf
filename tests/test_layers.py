"""Imports point one way: jobs -> pipelines -> deedsr, and the method knows nothing of what runs it."""

import ast
import subprocess
from collections.abc import Collection
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


def modules() -> dict[str, Path]:
    """Every module of the three layers by its dotted name."""
    files = [path for layer in ("deedsr", "pipelines", "jobs") for path in (ROOT / layer).rglob("*.py") if path != DOOR]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path, known: Collection[str]) -> set[str]:
    """Modules of `known` that a file imports, also inside functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & set(known)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another."""
    reached = {node: set(targets) for node, targets in graph.items()}
    for between in graph:
        for node in graph:
            if between in reached[node]:
                reached[node] |= reached[between]
    groups = {tuple(sorted(n for n in graph if n in reached[node] and node in reached[n])) for node in graph}
    return [list(group) for group in sorted(groups) if group]


def folder(module: str) -> str:
    """The folder of its layer that a module is in; the module itself where it lies beside the folders."""
    layer, _, rest = module.partition(".")
    return f"{layer}.{rest.partition('.')[0]}" if rest else layer


@pytest.mark.parametrize("of", ["modules", "folders"])
def test_nothing_imports_itself_through_others(of):
    files = modules()
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        name = (lambda module: module) if of == "modules" else folder
        graph.setdefault(name(module), set()).update({name(found) for found in imports(path, files)} - {name(module)})
    assert circles(graph) == []


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
