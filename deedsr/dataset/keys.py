"""Names of crops and samples, and the random generators derived from such names.

Everything random about a sample follows from what the sample *is* (its source's relative path, its place, its variant,
the recipe's seed), never from the order of work, so that equal inputs give equal bytes on any machine.
"""

import hashlib

import numpy as np


def content_key(root: int, path: str, top: int, left: int) -> str:
    """Name one crop: 20 hexadecimal characters (80 bits).

    `root` is the ordinal of the `--source` that the file was found under, `path` the file's relative path (posix) below
    it, `top` and `left` the crop's corner in source pixels.
    """
    return _digest("content", root, path, top, left).hex()[:20]


def sample_key(content: str, variant: int) -> str:
    """Name one degradation of a crop, `{content}-{variant:02d}`: no dot, the same in every regeneration."""
    return f"{content}-{variant:02d}"


def generator(*parts: str | int) -> np.random.Generator:
    """A Philox generator seeded by the SHA-256 of `parts`: equal parts give equal numbers, others independent ones.

    The stream of raw bits is fixed by its key on every platform and numpy version.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(*parts)[:16], "little")))


def _digest(*parts: str | int) -> bytes:
    """SHA-256 of the parts; each carries its kind and length, so that no two different tuples read alike."""
    sha = hashlib.sha256()
    for part in parts:
        text = str(part).encode(errors="surrogateescape")  # file names need not be valid UTF-8
        sha.update(f"{'text' if isinstance(part, str) else 'number'}:{len(text)}:".encode() + text)
    return sha.digest()
