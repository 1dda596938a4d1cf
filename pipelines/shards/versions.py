"""Versions of the libraries that can change a shard's bytes, as far as equal bytes were seen."""

import logging
import re
from importlib.metadata import PackageNotFoundError, version

__all__ = ["SEEN", "warn_of_versions"]

logger = logging.getLogger(__name__)

# The ranges of pyproject.toml: from, and below. The lowest and highest version in each made equal shards.
SEEN = {
    "numpy": ("2.1", "2.6"),
    "opencv-python-headless": ("4.13", "5.0.1"),
    "pillow": ("12.3", "13.1"),
    "scipy": ("1.15", "1.19"),
    "simplejpeg": ("1.8.2", "1.10"),
    "webdataset": ("1.0.2", "1.1"),
}


def warn_of_versions() -> None:
    """One line for each library of this process whose version is outside."""
    for name, (low, high) in SEEN.items():
        found = _found(name)
        if found is not None and not _numbers(low) <= _numbers(found) < _numbers(high):
            logger.warning(
                "shards: %s %s is outside %s to below %s, where the bytes of shards are known to be equal",
                name,
                found,
                low,
                high,
            )


def _found(name: str) -> str | None:
    if name.startswith("opencv"):  # several packages bring it
        import cv2

        return cv2.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:4]))
