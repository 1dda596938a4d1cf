"""Typed options: a dataclass becomes a parser; a YAML file and dotted overrides become the dataclass.

The comment behind a field is its help text. A field without a default, or with an empty text as default, must be
given. A configuration file is read as the arguments it stands for, so that a file and a command line are checked by
the same code and refused in the same words. What is typed wins over the file, the file over a preset.
"""

import argparse
import dataclasses
import inspect
import io
import re
import tokenize
import types
import typing
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser

from deedsr.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Option:
    """One value that a command takes."""

    key: str  # dotted, e.g. train.lr
    type: Any
    default: Any  # dataclasses.MISSING where it must be given
    help: str
    group: str = ""  # the key before the last dot

    @property
    def flag(self) -> str:
        return spelled(f"--{self.key}")

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING or self.default == ""

    @property
    def many(self) -> bool:
        return typing.get_origin(self.type) is list

    @property
    def metavar(self) -> str:
        for part in (self.type, *typing.get_args(self.type)):
            if typing.get_origin(part) is Literal:
                return "{" + ",".join(str(value) for value in typing.get_args(part)) + "}"
        if self.type is bool:
            return "[true|false]"
        return self.key.rpartition(".")[2].upper()


def trailing_comments(kind: type) -> dict[str, str]:
    """Field name -> the comment behind its definition."""
    comments, name = {}, ""
    for base in [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]:
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(base)).readline):
            if field := re.match(r"\s+(\w+):", token.line):
                name = field[1]
            if token.type == tokenize.COMMENT:
                comments[name] = token.string.lstrip("# ")
    return comments


def leaves(kind: type, group: str = "") -> list[Option]:
    """Every value of a dataclass, nested ones under dotted keys, in the order of definition."""
    hints, comments = typing.get_type_hints(kind), trailing_comments(kind)
    found: list[Option] = []
    for field in dataclasses.fields(kind):
        key = f"{group}.{field.name}" if group else field.name
        if isinstance(hints[field.name], type) and dataclasses.is_dataclass(hints[field.name]):
            found += leaves(hints[field.name], key)
            continue
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default  # type: ignore[operator]
        found.append(Option(key, hints[field.name], default, comments.get(field.name, ""), group))
    return found


def accepted(hint: Any) -> str:
    """What a type takes, in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(str(part) for part in parts)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(accepted(part) for part in parts)
    if origin is list:
        return accepted(parts[0])
    if origin is dict:
        return "a mapping"
    if restricted := re.fullmatch(r"(int|float) restricted to be (.+)", hint.__doc__ or ""):
        return f"{words[int if restricted[1] == 'int' else float]} {restricted[2]}"
    return words.get(hint, "text")


@dataclasses.dataclass
class Request:
    """What was typed: the options as a dataclass, and how the result is wanted."""

    options: Any
    as_json: bool


class HelpText(argparse.RawDescriptionHelpFormatter):
    """Help with room for dotted names."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Every spelling with its value, as up to Python 3.12; later ones give the value once."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(f"{flag} {value}" for flag in action.option_strings)


class CommandParser(ArgumentParser):
    """Parser of one command. A mistake is one `UsageError` that names the key, the value and what is accepted.

    `kind`: dataclass of the options. `operand`: the option that may be typed without its name. `presets`: name ->
    nested values that stand under everything else; the first is the default. `details`: makes the end of the help.
    """

    def __init__(
        self,
        kind: type,
        *,
        command: str,
        description: str,
        operand: str = "",
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        details: Callable[[], str] | None = None,
    ):
        self.details = details
        self.kind, self.command, self.operand, self.presets = kind, command, operand, presets or {}
        self.options = {option.key: option for option in leaves(kind)}
        self.argv: list[str] = []
        self.origins: dict[str, Path] = {}  # key -> the file that gives it
        super().__init__(
            prog=f"deedsr {command}",
            usage=self._usage(),
            description=description,
            formatter_class=HelpText,
            exit_on_error=False,
            allow_abbrev=False,
            add_help=False,
        )
        self._add_options()

    def _usage(self) -> str:
        required = sorted((o for o in self.options.values() if o.required), key=lambda o: o.key != self.operand)
        words = [
            ("" if option.key == self.operand else f"{option.flag} ") + option.metavar + ("..." if option.many else "")
            for option in required
        ]
        return " ".join([f"deedsr {self.command}", *words, "[options]"])

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        return super().format_help(formatter) + (f"\n{self.details()}\n" if self.details else "")

    def _add_options(self) -> None:
        if self.operand:
            self.add_argument("operands", nargs="*", type=str, help=argparse.SUPPRESS)
        preset = words_of(next(iter(self.presets.values()), {}))
        groups: dict[str, Any] = {}
        for option in sorted(self.options.values(), key=lambda option: (not option.required, option.group != "")):
            title = option.group or ("required" if option.required else "options")
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            item = typing.get_args(option.type)[0] if option.many else option.type
            many: dict[str, Any] = {"nargs": "+", "action": "extend"} if option.many else {}
            if option.many and typing.get_origin(item) is Literal:
                item, many = str, many | {"choices": typing.get_args(item)}
            shown = " ".join(preset.get(option.key, [word_of(option.default)]))
            unsaid = option.required or shown in ("null", "[]", "{}")
            groups[title].add_argument(
                option.flag,
                dest=option.key,
                type=item,
                default=None if option.required or option.many else option.default,
                metavar=option.metavar,
                help=(option.help + ("" if unsaid else f" (default: {shown})")).strip().replace("%", "%%"),
                **many,
            )
        common = self.add_argument_group("every command")
        if self.presets:
            names = "{" + ",".join(self.presets) + "}"
            text = f"starting values, over which the others go (default: {next(iter(self.presets))})"
            common.add_argument("--preset", type=Literal[*self.presets], metavar=names, help=text)  # type: ignore[valid-type]
        common.add_argument(
            "--config", nargs=1, action="extend", type=str, metavar="FILE.yaml", help="read options here"
        )
        common.add_argument("--json", action="store_true", help="print the result as one JSON object on one line")
        common.add_argument("-h", "--help", action="help", help="show this text and exit")

    def read(self, argv: list[str]) -> Request:
        """Options and wishes from the words behind the command; UsageError when they are wrong."""
        argv = [self._completed(word, behind) for word, behind in zip(argv, [*argv[1:], ""], strict=False)]
        typed = {key_of(word) for word in argv if word.startswith("--")}
        given = self._parse(argv)
        values: dict[str, list[str]] = {}
        for path in [Path(name) for name in given["config"] or []]:
            in_file = words_of(mapping_of(path))
            values |= in_file
            self.origins |= dict.fromkeys(in_file, path)
        self.origins = {key: path for key, path in self.origins.items() if key not in typed}
        words = [spelled(f"--{key}={word}") for key in values if key not in typed for word in values[key]]
        given = self._parse(words + argv)
        if self.presets:
            preset = words_of(self.presets[given["preset"] or next(iter(self.presets))])
            words = [spelled(f"--{key}={word}") for key, [word] in preset.items()] + words
            given = self._parse(words + argv)
        return Request(self._build(given), given["json"])

    def _completed(self, word: str, behind: str) -> str:
        """A word in the parser's spelling; a switch such as --wait stands for --wait=true."""
        option = self.options.get(key_of(word)) if word.startswith("--") and "=" not in word else None
        switch = option is not None and option.type is bool and behind not in ("true", "false")
        return spelled(word) + ("=true" if switch else "")

    def _parse(self, argv: list[str]) -> Any:
        self.argv = argv
        try:
            return self.parse_args(argv)
        except argparse.ArgumentError as error:
            self.error(str(error))

    def _build(self, given: Any) -> Any:
        if self.operand and (operands := given["operands"]):
            many = self.options[self.operand].many
            twice = given[self.operand] is not None and self.operand not in self.origins
            if twice or (len(operands) > 1 and not many):
                self.error(f"unrecognized arguments: {operands[-1]}")
            given[self.operand] = operands if many else operands[0]
        missing = [option for option in self.options.values() if option.required and not given[option.key]]
        if missing:
            self.error(
                "missing "
                + ", ".join(
                    f"{option.key.upper() if option.key == self.operand else option.flag} ({option.help})"
                    for option in missing
                )
            )
        for option in self.options.values():
            if option.many and given[option.key] is None:
                given[option.key] = option.default
        return build(self.kind, given)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise one UsageError in place of argparse's usage text and exit."""
        raise UsageError(f"{self._explain(message)}\nsee: deedsr {self.command} --help") from ex

    def _explain(self, message: str) -> str:
        if match := re.match(r"unrecognized arguments: (.*)", message):
            return self._unknown(match[1].split())
        match = re.match(r'(?:Parser key "|argument (?:-h/)?--)([\w.-]+)', message)
        if not match:
            return " ".join(message.split())
        key = match[1].replace("-", "_")
        takes = accepted(self.options[key].type) if key in self.options else " or ".join(self.presets)
        if re.search(r"expected (one|at least one|1) argument", message):
            return f"--{match[1]} needs a value" + (f": {takes}" if key in self.options else "")
        return f"{self._named(key)} takes {takes}, got {self._given(key)!r}"

    def _named(self, key: str) -> str:
        flag = spelled(f"--{key}")
        return f"{flag} (in {self.origins[key]})" if key in self.origins else flag

    def _given(self, key: str) -> str:
        """The last value typed for a key."""
        for number, word in reversed(list(enumerate(self.argv))):
            if word.startswith("--") and key_of(word) == key:
                return word.partition("=")[2] if "=" in word else " ".join(self.argv[number + 1 : number + 2])
        return ""

    def _unknown(self, words: list[str]) -> str:
        keys = [key_of(word) for word in words if word.startswith("--")]
        if not keys:
            return f"unexpected argument {words[0]!r}"
        members = [option.flag for name, option in self.options.items() if name.startswith(f"{keys[0]}.")]
        if members:
            return f"{self._named(keys[0])} is a group; set its members, such as {' or '.join(members[:2])}"
        last = keys[0].rpartition(".")[2]
        close = [name for name in self.options if name.rpartition(".")[2] == last]
        close += get_close_matches(keys[0], [*self.options, "config", "json", "help"], n=1)
        value = f" = {self._given(keys[0])}" if self._given(keys[0]) else ""
        return f"unknown option {self._named(keys[0])}{value}" + (
            f"; did you mean {spelled('--' + close[0])}?" if close else ""
        )


def key_of(word: str) -> str:
    """The dotted key of a word such as --train.lr=3 or --noise-guidance."""
    return word[2:].partition("=")[0].replace("-", "_")


def spelled(word: str) -> str:
    """An option in the one spelling the parser knows: dashes in plain names, underscores behind dots."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    key = name[2:].replace("-", "_")
    return f"--{key if '.' in key else key.replace('_', '-')}{equals}{value}"


def build(kind: type, given: Any) -> Any:
    """The dataclass that a parsed namespace describes."""
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        hint, value = hints[field.name], given[field.name]
        values[field.name] = build(hint, value) if dataclasses.is_dataclass(hint) else value  # type: ignore[arg-type]
    return kind(**values)


def mapping_of(path: Path) -> dict[str, Any]:
    """Content of a configuration file; UsageError where it is none."""
    try:
        content = yaml.safe_load(path.read_bytes())  # UTF-8, or UTF-16 with its byte order mark
    except OSError as error:
        raise UsageError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping of options such as `train: {{lr: 1e-4}}`, got {content!r:.60}")
    return content


def words_of(tree: Mapping[str, Any], group: str = "") -> dict[str, list[str]]:
    """Nested values as dotted keys and the words one would type for them."""
    words: dict[str, list[str]] = {}
    for name, value in tree.items():
        key = f"{group}.{name}" if group else str(name)
        if isinstance(value, Mapping):
            words |= words_of(value, key)
        else:
            words[key] = [word_of(item) for item in value] if isinstance(value, list) else [word_of(value)]
    return words


def word_of(value: Any) -> str:
    """A YAML scalar as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
