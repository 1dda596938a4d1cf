"""Errors that a user can act on. Each carries the exit code of the command that meets it."""


class DeeDSRError(Exception):
    """The work failed. The message names the thing and the remedy."""

    exit_code = 1


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
