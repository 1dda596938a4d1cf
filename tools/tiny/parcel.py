"""Code and reduced photographs in one archive, for a machine without a package index or a repository."""

import io
import subprocess
import tarfile
from pathlib import Path

from PIL import Image

LIMIT = 60e6  # bytes
QUALITIES = (90, 84, 78, 70)  # of the photographs, the first with which the archive is small enough
CODE = ("deedsr", "tools", "benchmarks", "docs/tiny", "pyproject.toml")  # as git lists it
LEFT_OUT = ("benchmarks/crops/", "deedsr/assets/photos/")


def write_parcel(photographs: Path, to: Path) -> None:
    """Write a .tar.gz with the repository's code and `work/photographs/`."""
    listed = subprocess.run(["git", "ls-files", "-z", *CODE], capture_output=True, text=True, check=True).stdout
    code = [name for name in listed.split("\0") if name and not name.startswith(LEFT_OUT)]
    files = sorted(photographs.glob("*.jpg"))
    for quality in QUALITIES:
        with tarfile.open(to, "w:gz", compresslevel=1) as archive:
            for name in code:
                archive.add(name)
            for path in files:
                buffer = io.BytesIO()
                Image.open(path).save(buffer, "JPEG", quality=quality, subsampling=0)
                member = tarfile.TarInfo(f"work/photographs/{path.name}")
                member.size = buffer.tell()
                buffer.seek(0)
                archive.addfile(member, buffer)
        size = to.stat().st_size
        print(f"{to}: {len(code)} files of code, {len(files)} photographs, quality {quality}, {size / 1e6:.1f} MB")
        if size <= LIMIT:
            return
    raise SystemExit(f"{to} is larger than {LIMIT / 1e6:.0f} MB: leave photographs out of {photographs}")
