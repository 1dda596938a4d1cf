"""Errors that a user can act on. Each carries the exit code of the command that meets it."""

import copyreg
from typing import Any


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
