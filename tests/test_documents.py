"""Names of code, commands and links in the documents exist; hooks before a commit are those of `make lint`."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SECTION = re.search(r"^## Where it is\n(.*?)^## ", (ROOT / "docs/architecture.md").read_text(), re.M | re.S)
PLACES = sorted(set(re.findall(r"`([\w/.-]+\.(?:py|yaml)(?::[\w.]+)?)`", SECTION[1] if SECTION else "")))


def names_of(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Classes, functions, attributes and constants, those of a class behind its name."""
    names = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= names_of(node.body, f"{prefix}{node.name}.")
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return names


def keys_of(tree: Any, prefix: str = "") -> set[str]:
    if not isinstance(tree, dict):
        return set()
    return {f"{prefix}{key}" for key in tree}.union(*(keys_of(value, f"{prefix}{key}.") for key, value in tree.items()))


def test_the_table_answers_what_a_newcomer_asks():
    assert SECTION
    assert len(re.findall(r"^\| .*\? \| .*`[\w/.-]+\.(?:py|yaml)", SECTION[1], re.M)) >= 13


@pytest.mark.parametrize("place", PLACES)
def test_what_the_table_names_exists(place):
    file, _, name = place.partition(":")
    path = ROOT / file
    assert path.is_file()
    if name:
        text = path.read_text()
        assert name in (names_of(ast.parse(text).body) if path.suffix == ".py" else keys_of(yaml.safe_load(text)))


def test_the_hooks_before_a_commit_run_what_make_lint_runs():
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.M)
    assert rule
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in hooks] == [
        line.strip() for line in rule[1].splitlines()
    ]


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]


def anchors_of(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_between_documents_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        path = document.parent / file if file else document
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path.read_text()), target


@pytest.mark.parametrize("document", sorted((ROOT / "docs/measured").glob("*.md")), ids=lambda path: path.stem)
def test_every_page_of_measurements_names_commands_that_exist(document):
    modules = set(re.findall(r"python -m (benchmarks\.\w+)", document.read_text()))
    assert modules
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").exists()] == []
