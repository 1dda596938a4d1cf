"""Selects the files of a working directory to upload, and checks the size limit of the cluster."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deedsr.errors import UsageError
from pipelines.tracking.provenance import flatten

# Anchored where a folder of the code has the same name: /shards is a dataset, pipelines/shards is code. Without a
# slash at the end, so that a folder that appears or goes changes nothing either.
CACHES = [".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", "*.egg-info"]
NOT_RUN = ["/README.md", "/Makefile", "/docs", "/tests", "/benchmarks", "/tools", "/infra", "/jobs/*.yaml"]
# What the README's commands write.
OUTPUTS = ["/out", "/demo", "/shards", "/heavy", "/latents", "/runs", "/pipeline", "/upscaled"]
OUTPUTS += ["/inspection.html", "/comparison.html", "/mlruns", "/mlartifacts", "*.db", "*.db-*"]
EXCLUDES = CACHES + NOT_RUN + OUTPUTS

_SHOWN = 5
_ZIP_ENTRY = 128  # bytes of headers, besides the name twice


def package(folder: Path, excludes: list[str], options: Mapping[str, Any]) -> str:
    """Ray's name for the upload: equal files, equal name. Raises UsageError where the Jobs API would refuse its size,
    or where one of the job's `options` names a file of `folder` that is left out.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
    from ray._private.runtime_env.packaging import get_uri_for_directory

    sizes = {path: path.stat().st_size for path in _files(folder, excludes)}
    total = sum(size + 2 * len(str(path)) + _ZIP_ENTRY for path, size in sizes.items())
    if total >= DASHBOARD_CLIENT_MAX_SIZE:
        largest = [f"{name} {size / 2**20:.1f} MiB" for name, size in _largest(folder, sizes)]
        raise UsageError(
            f"working_dir {folder} holds {total / 2**20:.0f} MiB and the Jobs API of Ray takes "
            f"{DASHBOARD_CLIENT_MAX_SIZE >> 20}: name what the job does not need in excludes or .gitignore; the "
            f"largest: {', '.join(largest)}"
        )
    strings = (
        (key, word)
        for key, given in flatten(options).items()
        for word in (given if isinstance(given, list) else [given])
    )
    for key, name in strings:
        if isinstance(name, str) and name and not os.path.isabs(name) and os.path.exists(folder / name):
            place = (folder / name).resolve()
            if not any(place == path.resolve() or place in path.resolve().parents for path in sizes):
                raise UsageError(
                    f"options.{key} is {name!r}, which is left out of the upload (.gitignore, excludes and "
                    f"{', '.join(NOT_RUN + OUTPUTS)}): move it, or put it on storage that all nodes reach"
                )
    return get_uri_for_directory(str(folder), include_gitignore=True, excludes=excludes)


def _files(folder: Path, excludes: list[str]) -> list[Path]:
    """Those that Ray packs."""
    from ray._private.runtime_env import packaging

    found: list[Path] = []
    matches = [packaging._get_excludes(folder, excludes)]
    packaging._dir_travel(folder, matches, lambda path: found.append(path), include_gitignore=True)
    return [path for path in found if path.is_file()]


def _largest(folder: Path, sizes: dict[Path, int]) -> list[tuple[str, int]]:
    """The largest files and folders. A folder stands for what it holds unless most of that is in one part of it."""
    below: Counter[Path] = Counter()
    for path, size in sizes.items():
        for place in [path, *path.parents]:
            if place == folder:
                break
            below[place] += size
    found = []
    for place in [place for place in below if place.parent == folder]:
        while heavy := [part for part in below if part.parent == place and 2 * below[part] > below[place]]:
            place = heavy[0]
        found.append((str(place.relative_to(folder)) + ("/" if place.is_dir() else ""), below[place]))
    return sorted(found, key=lambda item: -item[1])[:_SHOWN]
