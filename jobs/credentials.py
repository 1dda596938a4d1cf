"""Finds values that look like credentials in a job: the cluster stores and shows jobs, so they must not be sent."""

import re
from collections.abc import Iterator
from typing import Any

# Words of a name, as in AWS_SECRET_ACCESS_KEY; names of files and folders that hold a credential are none.
_NAME_WORDS = {
    "secret",
    "token",
    "pass",
    "passwd",
    "password",
    "passphrase",
    "credential",
    "credentials",
    "key",
    "apikey",
}
_PLACE_WORDS = {"path", "file", "dir", "name"}
_VALUES = re.compile(
    "|".join(
        [
            r"://[^/@\s:]*:[^/@\s]+@",  # password of a URL
            r"://[^/@\s:]{16,}@",  # token as user of a URL
            r"[?&](?:[\w-]*[-_])?(?:token|key|signature|password|secret|sig)=",  # signed URL
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS
            r"\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}",  # GitHub, GitLab
            r"\bhf_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}|\bxox[abprs]-[\w-]{10,}|\bdapi[0-9a-f]{32}\b",
            r"\bpypi-[\w-]{30,}|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.",  # PyPI, Google, JSON web token
            r"-----BEGIN [A-Z ]*PRIVATE KEY",
        ]
    ),
    re.IGNORECASE,
)


def suspicious(tree: Any, key: str = "", name: str = "") -> Iterator[str]:
    """Dotted keys of `tree` whose name or value looks like a credential."""
    if isinstance(tree, dict):
        for word, value in tree.items():
            yield from suspicious(value, f"{key}.{word}" if key else str(word), str(word))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from suspicious(value, f"{key}[{number}]", name)
    elif _VALUES.search(f"{name} {tree}") or (_is_secret_name(name) and tree not in (None, "")):
        yield key


def _is_secret_name(name: str) -> bool:
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    words = [word.lower() for word in words]
    return bool(words) and not _PLACE_WORDS & {words[-1]} and not _NAME_WORDS.isdisjoint(words)
