"""Model card and licence of a model folder, written from the folder's records."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNKNOWN = "other"  # no licence was named


def write_card(folder: Path, *, scale: int, sampling: Mapping[str, Any], lineage: Mapping[str, Any]) -> None:
    """Write `README.md`, a model card as the hub reads them, and `LICENSE` into a model's folder.

    `lineage`: `license`, `base` and `training`, as far as they are known (`ModelFolder.lineage`).
    """
    (folder / "README.md").write_text(model_card(scale, sampling, lineage))
    (folder / "LICENSE").write_text(_licence(lineage))


def copy_base_licence(base: Path, folder: Path) -> None:
    """Copy the base's licence as `LICENSE-base` if its folder holds one: it also covers models built on the base."""
    found = sorted(path for path in base.glob("LICENSE*") if path.is_file())
    if (base / "learner").is_dir():  # a DeeDSR model, whose LICENSE is its adapter's
        found = [path for path in found if path.name == "LICENSE-base"]
    if found:
        shutil.copyfile(found[0], folder / "LICENSE-base")


def model_card(scale: int, sampling: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    """Text of the card; missing records are named as missing."""
    base, training = _named(lineage.get("base")), lineage.get("training") or {}
    head = {
        "license": lineage.get("license") or UNKNOWN,
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": "[super-resolution, deedsr]",
    }
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        head["base_model"] = base
    figures = {f"`{name}`": f"{value:.4g}" for name, value in sorted((training.get("metrics") or {}).items())}
    sections = [
        "---\n" + "".join(f"{name}: {value}\n" for name, value in head.items()) + "---",
        f"# DeeDSR model, x{scale}",
        f"Enlarges degraded photographs by {scale}: a degradation-aware adapter and a degradation learner around a "
        f"frozen diffusion model{f', {base}' if base else ''}. It invents detail that fits the picture: its output is "
        "no evidence of what was there.",
        "```python\nfrom deedsr import DeeDSRPipeline\n\n"
        'pipe = DeeDSRPipeline.from_pretrained("THIS FOLDER")\nimage = pipe(lr_image).images[0]\n```',
        "## Training\n" + _table(_training_rows(training), "Not recorded."),
        "## Figures\n" + _table(figures, "Not recorded."),
        "## Sampling defaults\n" + _table(sampling, "The package's own."),
        "## Licence\n" + _licence(lineage),
    ]
    return "\n\n".join(sections).rstrip() + "\n"


def _named(base: str | None) -> str | None:
    """A base's public name: without a revision; of a local folder its last part."""
    return Path(base).name if base and Path(base).is_absolute() else base and base.partition("@")[0]


def _training_rows(training: Mapping[str, Any]) -> dict[str, Any]:
    dataset, configuration = training.get("dataset") or {}, training.get("configuration") or {}
    return {
        "steps": training.get("step"),
        "samples seen": training.get("samples_seen"),
        "dataset, SHA-256": dataset.get("digest"),
        "pairs in it": dataset.get("samples"),
        "recipe": dataset.get("recipe"),
        "learner, SHA-256": training.get("learner"),
        "base predicts": training.get("prediction_type"),
        "left out": ", ".join((configuration.get("model") or {}).get("ablate") or []) or None,
        "written by": training.get("created_by"),
    }


def _table(rows: Mapping[str, Any], otherwise: str) -> str:
    rows = {name: value for name, value in rows.items() if value is not None}
    if not rows:
        return otherwise
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _licence(lineage: Mapping[str, Any]) -> str:
    name = lineage.get("license") or UNKNOWN
    own = "no licence was named when they were trained: ask who trained them" if name == UNKNOWN else name
    base = _named(lineage.get("base")) or "its own"
    return (
        f"Adapter and learner: {own}.\n"
        f"They work with a base, {base}, whose own licence holds for it and for what is made with it.\n"
    )
