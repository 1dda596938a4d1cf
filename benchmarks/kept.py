"""Results kept on disk under the hash of all that they follow from, the code included, so that none goes stale."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def fingerprint(*parts: Any) -> str:
    """SHA-256, hexadecimal, over arrays, the bytes of files and folders, and JSON values."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        elif isinstance(part, Path):
            inside = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
            for path in (path for path in inside if path.suffix != ".pyc"):
                sha.update(str(path.relative_to(part)).encode() + hashlib.sha256(path.read_bytes()).digest())
        else:
            sha.update(json.dumps(part, sort_keys=True).encode())
    return sha.hexdigest()


class Kept:
    """A folder of results; what is not in it yet is computed and added atomically."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def row(self, key: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        path = self.folder / f"{key}.json"
        if not path.exists():
            self._write(path, json.dumps(compute()).encode())
        return json.loads(path.read_text())

    def picture(self, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """uint8 RGB (H, W, 3)."""
        import cv2

        path = self.folder / f"{key}.png"
        if not path.exists():
            self._write(path, cv2.imencode(".png", cv2.cvtColor(compute(), cv2.COLOR_RGB2BGR))[1].tobytes())
        return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(data)
        part.replace(path)
