"""Errors that a user can act on. Each carries the exit code of the command that meets it."""

import copyreg
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, get_args


class DeeDSRError(Exception):
    """The work failed. The message names the thing and the remedy."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is, message and fields: by default a class that writes its message itself would be given that again."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class UsageError(DeeDSRError):
    """The command or its configuration is wrong."""

    exit_code = 2


class DatasetNotCommitted(DeeDSRError):
    """A location without `manifest.json`: generation never finished there."""

    def __init__(self, uri: str):
        super().__init__(
            f"{uri} has no manifest.json, so it is not a finished dataset: "
            "run the same `deedsr shards` command again to complete it"
        )


def explained(problem: Mapping[str, Any], model: Any) -> str:
    """One line on one wrong key of data for a pydantic model: its dotted name, what is accepted, what was given."""
    where = ".".join(map(str, problem["loc"]))
    match problem["type"]:
        case "extra_forbidden":
            keys = _keys(problem["loc"][:-1], model)
            close = get_close_matches(str(problem["loc"][-1]), keys, n=1, cutoff=0.5)
            guess = f"did you mean {close[0]}? " if close else ""
            return f"unknown key {where}; {guess}accepted here: {', '.join(keys)}"
        case "missing":
            return f"{where} is missing"
        case "value_error":  # our own messages already give the value
            return f"{where} {problem['ctx']['error']}".strip()
        case "model_type":
            return f"{where} must be a mapping of {', '.join(_keys(problem['loc'], model))}, got {problem['input']!r}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where}: {message}, got {problem['input']!r:.80}"


def _keys(location: tuple[int | str, ...], model: Any) -> list[str]:
    for part in location:
        if hasattr(model, "model_fields"):
            model = model.model_fields[str(part)].annotation
        else:  # a list's position or a mapping's key: the members' model comes last, but for an ellipsis
            model = [kind for kind in get_args(model) if kind is not ...][-1]
    return list(model.model_fields)
