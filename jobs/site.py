"""Values that job files leave open: a site's own names, and options that `--set` overrides.

A site's names replace YOUR-... in job files. They come from `site.yaml` beside the job file, which git ignores
(`jobs/site.example.yaml` is one to copy), or from the environment: YOUR-BUCKET from YOUR_BUCKET, which wins.
"""

import copy
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deedsr.errors import UsageError
from jobs.options import mapping_of, word_of

SITE = "site.yaml"
PLACEHOLDER = re.compile(r"YOUR(?:-[A-Z0-9]+)+")


def filled(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """A job file's content with the site's names in it. Raises UsageError where one is missing."""
    names = _names(path.parent / SITE)
    missing: dict[str, list[str]] = {}

    def fill(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: fill(item, f"{key}.{name}".lstrip(".")) for name, item in value.items()}
        if isinstance(value, list):
            return [fill(item, key) for item in value]
        if not isinstance(value, str):
            return value
        for name in PLACEHOLDER.findall(value):
            if name not in names:
                missing.setdefault(name, []).append(key)
        return PLACEHOLDER.sub(lambda found: names.get(found[0], found[0]), value)

    content = fill(tree, "")
    if missing:
        where = "; ".join(f"{name} in {', '.join(dict.fromkeys(keys))}" for name, keys in missing.items())
        name = next(iter(missing))
        raise UsageError(
            f"{path}: {where}: give your own names in {path.parent / SITE} (a line such as `{name}: ...`; "
            f"site.example.yaml is one to copy) or in variables such as {name.replace('-', '_')}"
        )
    return content


def _names(path: Path) -> dict[str, str]:
    names = mapping_of(path) if path.exists() else {}
    for name, value in names.items():
        if not PLACEHOLDER.fullmatch(str(name)) or not isinstance(value, str | int):
            raise UsageError(f"{path}: lines are such as `YOUR-BUCKET: photos`, got `{name}: {value}`")
    variables = {key.replace("_", "-"): value for key, value in os.environ.items() if key.startswith("YOUR_") and value}
    return {name: str(value) for name, value in names.items()} | variables


def overridden(tree: dict[str, Any], settings: list[str], path: Path) -> Iterator[dict[str, Any]]:
    """A job for each combination of the values in `settings`, such as `train.lr=1e-5,3e-5`.

    Where there are several, `name` and `options.out` of each end in what it has of them: learner-lr-1e-5.
    """
    choices = [_choices(setting) for setting in settings]
    for values in itertools.product(*(values for _, values in choices)):
        job = copy.deepcopy(tree)
        options = job.setdefault("options", {})
        if not isinstance(options, dict):
            raise UsageError(f"{path}: options must be a mapping, got {options!r:.60}")
        labels = []
        for (key, several), value in zip(choices, values, strict=True):
            _put(options, key.split("."), value)
            if len(several) > 1:
                labels.append(_label(key, value))
        if labels:
            job["name"] = "-".join([str(job.get("name", "deedsr")), *labels])
            if "out" in options and "out" not in [key for key, several in choices if len(several) > 1]:
                options["out"] = "-".join([str(options["out"]).rstrip("/"), *labels])
        yield job


def _choices(setting: str) -> tuple[str, list[Any]]:
    """The key, and the values as YAML reads them between brackets; one with a comma in it is quoted."""
    key, equals, text = setting.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z][\w.-]*", key):
        raise UsageError(f"--set takes KEY=VALUE of the job's options, such as train.lr=3e-5, got {setting!r}")
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise UsageError(f"--set {setting}: put the value in quotes that YAML knows, such as {key}='\"...\"'") from None
    if not values:
        raise UsageError(f"--set {key}= needs a value; null stands for none")
    return key.removeprefix("options.").replace("-", "_"), values


def _put(options: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(options.get(key), dict):
            options[key] = {}
        options = options[key]
    options[keys[-1]] = value


def _label(key: str, value: Any) -> str:
    said = word_of(value).rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9]+", "-", f"{key.rpartition('.')[2]}-{said}").strip("-")
