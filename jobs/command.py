"""Interface of a command module."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


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
