"""Packages that tests install."""


def install(folder, name: str, code: str, points: str = "") -> None:
    """A package with its metadata, as pip leaves it."""
    (folder / f"{name}.py").write_text(code)
    metadata = folder / f"{name}-1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (metadata / "entry_points.txt").write_text(points)
