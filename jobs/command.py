"""Interface of a command module."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jobs.options import RunOptions, leaves


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a command: `values` is the JSON object of `--json`, `text` the readable form."""

    values: Mapping[str, Any]
    text: str = ""  # empty: the values, one a line
    complete: bool = True  # False: part of the work failed (exit code 1); `values` has the failures

    def __str__(self) -> str:
        if self.text:
            return self.text
        width = max(map(len, self.values), default=0)
        return "\n".join(f"{key.replace('_', ' '):<{width}}  {readable(value)}" for key, value in self.values.items())


def readable(value: Any) -> str:
    """A value for people: floats to four digits, lists and nested mappings one item a line."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping) and any(isinstance(item, Mapping) for item in value.values()):
        return "".join(f"\n  {key}: {readable(item)}" for key, item in value.items())
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {readable(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "".join(f"\n  {readable(item)}" for item in value) if value else "none"
    return str(value)


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its options, the function that runs it, and its help."""

    options: type
    run: Callable[[Any], Outcome]
    example: str  # shown by --help
    details: Callable[[], str] | None = None  # shown by --help, last
    operand: str = ""  # the option that may be typed without its name
    # Name -> nested values that stand under everything else; the first is the default.
    presets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    check: Callable[[Any], None] = lambda options: None  # raises UsageError for options that are wrong for any data
    tracked: str = ""  # the words behind `deedsr` of a command that begins an MLflow run

    def __call__(self, options: Any, about: RunOptions = RunOptions()) -> Outcome:
        """Run the command; `about` goes to its MLflow run."""
        if not self.tracked:
            return self.run(options)
        from pipelines import tracking

        preset, settings = self._settings(options)
        tags = dict(tag.split("=", 1) for tag in about.tag)
        with tracking.begun_by(tracking.Origin(self.tracked, preset, settings, about.run_name, about.note, tags)):
            return self.run(options)

    def _settings(self, options: Any) -> tuple[str, dict[str, Any]]:
        """The preset from which the options differ least, and those that differ."""
        from pipelines.tracking.description import PLACES
        from pipelines.tracking.provenance import flatten

        given = flatten(dataclasses.asdict(options))
        defaults = {leaf.key: leaf.default for leaf in leaves(self.options)}
        found = []
        for name, preset in (self.presets or {"": {}}).items():
            base = defaults | flatten(preset)
            different = {key: value for key, value in given.items() if value != base.get(key, {})}
            found.append((name, {k: v for k, v in different.items() if k.rpartition(".")[2] not in PLACES}))
        name, settings = min(found, key=lambda item: len(item[1]))
        return name, dict(
            sorted(settings.items(), key=lambda item: item[0] != "model")
        )  # what is evaluated comes first
