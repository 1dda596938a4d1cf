"""Options of a command: a dataclass whose fields are `Annotated[type, "help"]`, read from words and YAML files.

argparse splits the words and prints the help; pydantic validates the values. Typed options win over a configuration
file, the file over a preset. A scalar in a file is validated as the word that one would type for it, so that files, job
files and command lines accept the same. A field without a default, or with an empty text as default, is required.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import re
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NoReturn

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from deedsr.errors import UsageError

COMMON = ("config", "json", "help")  # for the command line only


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What is typed about the MLflow run of a command, beside its options."""

    run_name: Annotated[str | None, "MLflow: name; null = stage, dataset and the options that differ"] = None
    note: Annotated[str | None, "MLflow: text above the description of the run"] = None
    tag: Annotated[tuple[str, ...], "MLflow: tags KEY=VALUE"] = ()


@dataclasses.dataclass(frozen=True)
class Option:
    """One value that a command takes."""

    key: str  # dotted, e.g. train.lr
    forms: list[dict[str, Any]]  # JSON schemas, one of which a value must match
    default: Any  # dataclasses.MISSING where it must be given
    help: str
    group: str = ""  # of the help

    @property
    def flag(self) -> str:
        return spelled(f"--{self.key}")

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING or self.default == ""

    @property
    def metavar(self) -> str:
        for form in self.forms:
            if choices := form.get("items", form).get("enum"):
                return "{" + ",".join(map(str, choices)) + "}"
        return "[true|false]" if self.takes("boolean") else self.key.rpartition(".")[2].upper()

    @property
    def accepted(self) -> str:
        return " or ".join(map(described, self.forms))

    def takes(self, kind: str) -> bool:
        """Whether values of a type of JSON schema, such as `array`, are accepted."""
        return any(form.get("type") == kind for form in self.forms)

    def value(self, given: Any) -> Any:
        """What pydantic validates: from a typed word, the words of a list, or a value of a file."""
        if isinstance(given, Mapping):
            return given
        if self.takes("array"):
            words = given if isinstance(given, list) else [given]
            text = any(form.get("items", {}).get("type") == "string" for form in self.forms)
            whole: Any = words
            if len(words) == 1 and (words[0] in ("[]", "null", None) or not text):
                whole = _parsed(word_of(words[0]))  # [4, 8] may be typed as one word
            if whole is None and self.takes("null"):
                return None
            return [word_of(word) for word in (whole if isinstance(whole, list) else words)]
        word = word_of(given)
        if word == "null" and self.takes("null"):
            return None
        if word.startswith("{") and self.takes("object"):
            return _parsed(word)
        return {word_of(choice): choice for form in self.forms for choice in form.get("enum", [])}.get(word, word)


def leaves(kind: type, group: str = "") -> list[Option]:
    """Every value of a dataclass, nested ones under dotted keys, in the order of definition."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found: list[Option] = []
    for field in dataclasses.fields(kind):
        key, hint = f"{group}.{field.name}" if group else field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            found += leaves(typing.cast(type, hint), key)
            continue
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default  # type: ignore[operator]
        schema = TypeAdapter(hint).json_schema()
        text = next((note for note in getattr(hint, "__metadata__", ()) if isinstance(note, str)), "")
        found.append(Option(key, schema.get("anyOf", [schema]), default, text, group))
    return found


def described(form: dict[str, Any]) -> str:
    """What a JSON schema accepts, in words."""
    if "items" in form:
        return described(form["items"])
    if "enum" in form:
        return " or ".join(map(str, form["enum"]))
    words = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "object": "a mapping"}
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign}{form[name]}" for name, sign in signs.items() if name in form)
    return f"{(words | {'null': 'null'}).get(form.get('type', ''), 'text')} {limits}".strip()


@dataclasses.dataclass
class Request:
    """What was typed: the options as a dataclass, and how the result is wanted."""

    options: Any
    as_json: bool
    about: RunOptions = RunOptions()


class CommandParser(argparse.ArgumentParser):
    """Parser of a `jobs.command.Command`. A mistake is one `UsageError` that names key, value and what is accepted."""

    def __init__(self, name: str, command: Any, description: str = ""):
        self.command, self.operand, self.presets, self.details = name, command.operand, command.presets, command.details
        # In a tuple, because pydantic takes no configuration beside a dataclass.
        self.adapter = TypeAdapter(tuple[command.options], config=ConfigDict(allow_inf_nan=False))
        self.options = {option.key: option for option in leaves(command.options)}
        self.about = {option.key: option for option in leaves(RunOptions)} if command.tracked else {}
        self.origins: dict[str, str] = {}  # key -> the file that gives it
        required = sorted((o for o in self.options.values() if o.required), key=lambda o: o.key != self.operand)
        words = [(o.flag + " ") * (o.key != self.operand) + o.metavar + "..." * o.takes("array") for o in required]
        super().__init__(
            prog=f"deedsr {name}",
            usage=" ".join([f"deedsr {name}", *words, "[options]"]),
            description=description,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
            argument_default=argparse.SUPPRESS,
            exit_on_error=False,
            allow_abbrev=False,
            add_help=False,
        )
        self._add_options()

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.details()}\n" if self.details else "")

    def _add_options(self) -> None:
        if self.operand:
            self.add_argument("operands", nargs="*", help=argparse.SUPPRESS)
        defaults, common = self._leaves_of(next(iter(self.presets.values()), {})), "every command"
        if self.presets:
            text = "starting values, over which the others go"
            names = list(self.presets)
            self.options["preset"] = Option("preset", [{"enum": names}], names[0], text, common)
        self.options |= {key: dataclasses.replace(option, group=common) for key, option in self.about.items()}
        groups: dict[str, Any] = {}
        for option in sorted(self.options.values(), key=lambda option: (not option.required, option.group != "")):
            title = option.group or ("required" if option.required else "options")
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            default = word_of(defaults.get(option.key, option.default))
            unsaid = option.required or default in ("null", "[]", "{}")
            many: dict[str, Any] = {"nargs": "+", "action": "extend"} if option.takes("array") else {}
            text = (option.help + ("" if unsaid else f" (default: {default})")).replace("%", "%%")
            groups[title].add_argument(option.flag, dest=option.key, metavar=option.metavar, help=text, **many)
        last = groups.get(common) or self.add_argument_group(common)
        last.add_argument("--config", action="append", metavar="FILE.yaml", help="read options here")
        last.add_argument("--json", action="store_true", help="print the result as one JSON object on one line")
        last.add_argument("-h", "--help", action="help", help="show this text and exit")

    def read(self, argv: list[str]) -> Request:
        """Options from the words behind the command; UsageError when they are wrong."""
        typed = self._typed(argv)
        as_json = typed.pop("json", False)
        given: dict[str, Any] = {}
        for path in typed.pop("config", []):
            content = mapping_of(path)
            content.pop("definitions", None)  # of logged metrics, which a run records beside its options
            in_file = self._leaves_of(content, path)
            given = _layered(given, in_file)
            self.origins |= dict.fromkeys(in_file, path)
        given = _layered(given, typed)
        self.origins = {key: path for key, path in self.origins.items() if key not in typed}
        if self.presets:
            preset = word_of(given.pop("preset", self.options["preset"].default))
            if preset not in self.presets:
                self._refuse("preset", preset)
            given = _layered(self._leaves_of(self.presets[preset]), given)
        about = {key: self.options[key].value(given.pop(key)) for key in self.about if key in given}
        for tag in about.get("tag", []):
            if not re.fullmatch(r"[\w./ -]{1,250}=.*", tag) or tag.startswith("mlflow."):
                self.error(f"--tag takes KEY=VALUE, got {tag!r}")
        return Request(self._build(given), as_json, RunOptions(**about))

    def words_of(self, tree: Mapping[str, Any]) -> dict[str, list[str]]:
        """The content of a configuration file as dotted keys and the words that one would type for them."""
        leaves = self._leaves_of(tree)
        return {key: _words(value, self.options[key].takes("array")) for key, value in leaves.items()}

    def _typed(self, argv: list[str]) -> dict[str, Any]:
        """Dotted keys and what was typed for them: a word, the words of a list, or a mapping."""
        try:
            known, rest = self.parse_known_args(self._joined(argv))
        except argparse.ArgumentError as error:  # of --train.lr without a value, or of --json=x
            name = error.argument_name or ""
            option = self.options.get(key_of(name))
            needs = "takes no value" if name == "--json" else "needs a value"
            self.error(f"{name} {needs}" + (f": {option.accepted}" if option else ""))
        typed = vars(known)
        for word in rest:
            if not word.startswith("--"):
                self.error(f"unexpected argument {word!r}")
            (mapping, _, member), value = key_of(word).rpartition("."), word.partition("=")[2]
            if mapping not in self.options or not self.options[mapping].takes("object"):
                self._unknown(key_of(word), value)
            typed = _layered(typed, {mapping: {member: _parsed(value)}})
        if operands := typed.pop("operands", []):
            many = self.options[self.operand].takes("array")
            if self.operand in typed or (len(operands) > 1 and not many):
                self.error(f"unexpected argument {operands[-1]!r}")
            typed[self.operand] = operands if many else operands[0]
        return {key: self.options[key].value(words) if key in self.options else words for key, words in typed.items()}

    def _joined(self, argv: list[str]) -> list[str]:
        """Words in the parser's spelling: --wait as --wait=true, an unknown option with the word behind it."""
        joined, pairs = [], zip(argv, [*argv[1:], ""], strict=False)
        for word, behind in pairs:
            option = self.options.get(key_of(word))
            if word.startswith("--") and word != "--" and "=" not in word:
                switch, unknown = option and option.takes("boolean"), not option and key_of(word) not in COMMON
                if (switch and behind in ("true", "false", "null")) or (unknown and behind and behind[:2] != "--"):
                    word = f"{word}={next(pairs)[0]}"
                elif switch:
                    word += "=true"
            joined.append(spelled(word))
        return joined

    def _leaves_of(self, tree: Mapping[str, Any], path: str | None = None, group: str = "") -> dict[str, Any]:
        """Nested values under the dotted keys of the options; UsageError where there is no such option."""
        found: dict[str, Any] = {}
        for name, value in tree.items():
            key = f"{group}{name}".replace("-", "_")
            if key in self.options:
                found[key] = value
            elif isinstance(value, Mapping) and any(option.startswith(f"{key}.") for option in self.options):
                found |= self._leaves_of(value, path, f"{key}.")
            else:
                self.origins |= {key: path} if path else {}
                self._unknown(key, " ".join(_words(value)))
        return found

    def _build(self, given: dict[str, Any]) -> Any:
        tree: dict[str, Any] = {}
        for key, value in given.items():
            *groups, name = key.split(".")
            node = functools.reduce(lambda node, group: node.setdefault(group, {}), groups, tree)
            node[name] = self.options[key].value(value)
        try:
            [options] = self.adapter.validate_python([tree])
        except ValidationError as error:
            for problem in error.errors():
                if problem["type"] != "missing":
                    keys = itertools.accumulate(map(str, problem["loc"][1:]), "{}.{}".format)
                    self._refuse(next(key for key in keys if key in self.options), problem["input"])
        if missing := [option for option in self.options.values() if option.required and not given.get(option.key)]:
            names = [option.key.upper() if option.key == self.operand else option.flag for option in missing]
            self.error("missing " + ", ".join(f"{name} ({o.help})" for name, o in zip(names, missing, strict=True)))
        return options

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError in place of argparse's usage text and exit."""
        raise UsageError(f"{message}\nsee: deedsr {self.command} --help")

    def _refuse(self, key: str, given: Any) -> NoReturn:
        self.error(f"{self._named(key)} takes {self.options[key].accepted}, got {word_of(given)!r}")

    def _named(self, key: str) -> str:
        return spelled(f"--{key}") + (f" (in {self.origins[key]})" if key in self.origins else "")

    def _unknown(self, key: str, given: str) -> NoReturn:
        members = [option.flag for name, option in self.options.items() if name.startswith(f"{key}.")]
        if members:
            self.error(f"{self._named(key)} is a group; set its members, such as {' or '.join(members[:2])}")
        if key in COMMON:
            self.error(f"{self._named(key)} is for the command line only")
        last = key.rpartition(".")[2]
        close = [name for name in self.options if name.rpartition(".")[2] == last]
        close += get_close_matches(key, [*self.options, *COMMON], n=1)
        guess = f"; did you mean {spelled('--' + close[0])}?" if close else ""
        self.error(f"unknown option {self._named(key)}{' = ' + given if given else ''}{guess}")


def key_of(word: str) -> str:
    """The dotted key of a word such as --train.lr=3 or --noise-guidance."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def spelled(word: str) -> str:
    """An option in the one spelling the parser knows: dashes in plain names, underscores behind dots."""
    if not word.startswith("--"):
        return word
    _, equals, value = word.partition("=")
    key = key_of(word)
    return f"--{key if '.' in key else key.replace('_', '-')}{equals}{value}"


def mapping_of(path: str | Path) -> dict[str, Any]:
    """Content of a configuration file, or of a run's (`runs:/ID/config.yaml`); UsageError where it is none."""
    try:
        if str(path).startswith("runs:/"):
            from pipelines.tracking.store import artifact_text

            return yaml.safe_load(artifact_text(str(path)))
        content = yaml.safe_load(Path(path).read_bytes())  # UTF-8, or UTF-16 with its byte order mark
    except OSError as error:
        raise UsageError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping of options such as `train: {{lr: 1e-4}}`, got {content!r:.60}")
    return content


def word_of(value: Any) -> str:
    """A YAML scalar as one would type it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _words(value: Any, several: bool = True) -> list[str]:
    """The words that one would type for a value of a file."""
    if isinstance(value, list) and value and several:
        return [word_of(item) for item in value]
    return [json.dumps(value, default=str) if isinstance(value, list | Mapping) else word_of(value)]


def _parsed(word: str) -> Any:
    """A word as YAML, or as it stands where it is none."""
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _layered(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`; mappings are joined."""
    both = [key for key in high if isinstance(high[key], Mapping) and isinstance(low.get(key), Mapping)]
    return {**low, **high, **{key: {**low[key], **high[key]} for key in both}}
