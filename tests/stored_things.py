"""Small results that an earlier version's commands wrote (tests/stored), unpacked, and what is expected of them.

`tests/stored/VERSION.tar.xz` holds the things, `VERSION.json` what they gave when they were written: digests, contents,
losses. tests/stored/write.py made both.
"""

import hashlib
import json
import platform
import shutil
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter
from training_process import Group

from pipelines.data.dataset import Dataset
from pipelines.training.config import (
    AdapterModelOptions,
    AdapterOptions,
    ContrastOptions,
    DiffusionOptions,
    LearnerModelOptions,
    LearnerOptions,
    TrainOptions,
)

STORED = Path(__file__).parent / "stored"
FOLDERS = [
    *("sources", "recipe.yaml", "dataset", "hr_from", "latents", "base", "init", "learner", "learner.yaml", "model"),
    *("model.yaml", "half_learner", "half_adapter", "pipeline", "pictures", "upscaled", "jobs", "mlflow.sql"),
]
_TEXT = {".json", ".md", ".sql", ".yaml"}

_TRAIN = {"num_workers": 1, "keep_checkpoints": 1, "log_every": 5, "validate_every": 0}
_LEARNER = {
    "preset": "tiny",
    "model": {"norm_group": 2, "statistics": "[4]"},  # a list would be taken for a word each
    "contrast": {"queue_size": 24, "batch_block": 4},
    "train": _TRAIN | {"global_batch_size": 8, "micro_batch_size": 4, "max_steps": 1000, "checkpoint_every": 5},
}
_ADAPTER = {
    "preset": "tiny",
    "diffusion": {"lr_crop": 12, "noise_guidance": 0.5, "snr_gamma": 5.0},
    "sampling": {"num_inference_steps": 2},
    "train": _TRAIN | {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 1000, "checkpoint_every": 5},
}
# Options of the trainings that are ended in the middle, and of those that are finished.
TRAININGS: dict[str, dict[str, Any]] = {"half_learner": _LEARNER, "half_adapter": _ADAPTER}
DONE = {
    "learner": _LEARNER | {"train": _LEARNER["train"] | {"max_steps": 4}},
    "model": _ADAPTER | {"train": _ADAPTER["train"] | {"max_steps": 4}},
}
CONTINUED = 5  # steps that the test adds to a half-done training


class Stored(NamedTuple):
    """The things of a version, unpacked in `folder`, and what is expected of them."""

    version: str
    folder: Path
    expected: dict[str, Any]


def unpack(version: str, folder: Path) -> Stored:
    """The things take `folder` for the one that they were written in."""
    expected = json.loads((STORED / f"{version}.json").read_text())
    with tarfile.open(STORED / f"{version}.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    for path in folder.rglob("*"):
        if path.suffix in _TEXT and (data := path.read_bytes()).find(expected["folder"].encode()) >= 0:
            path.write_bytes(data.replace(expected["folder"].encode(), str(folder).encode()))
    return Stored(version, folder, expected)


def restore_store(stored: Stored, path: Path) -> None:
    """The MLflow store as it was, in an SQLite file."""
    with closing(sqlite3.connect(path)) as database:
        database.executescript((stored.folder / "mlflow.sql").read_text())


def samples_digest(dataset: Dataset) -> str:
    """SHA-256 over all that is read of each sample: pixels or latents, and the draws."""
    digest = hashlib.sha256()
    index = dataset.index()
    for row in range(index.num_rows):
        sample = dataset.read_latents(index, row) if dataset.manifest.latents else dataset.read(index, row)
        digest.update(repr(list(_plain(sample))).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Iterator[Any]:
    """Leaves of a sample in their order, arrays as type, shape and hash."""
    if isinstance(value, np.ndarray):
        yield str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    elif isinstance(value, tuple):
        for item in value:
            yield from _plain(item)
    else:
        yield json.dumps(value, sort_keys=True)


def digests(folder: Path) -> dict[str, str]:
    """Everything that is stored as a digest somewhere, computed anew."""
    from deedsr.hub.weights import base_digest, part_digest
    from pipelines.models import Model
    from pipelines.storage import open_storage
    from pipelines.tracking.registry import weights_digest

    datasets = {name: Dataset.open(str(folder / name)) for name in ("dataset", "hr_from", "latents")}
    return (
        {f"digest of {name}": dataset.digest for name, dataset in datasets.items()}
        | {f"order of samples of {name}": dataset.order_digest for name, dataset in datasets.items()}
        | {f"recipe of {name}": dataset.recipe.digest for name, dataset in datasets.items()}
        | {
            f"part {part}": part_digest(folder / part)
            for part in ("base/vae", "base/unet", "model/learner", "model/adapter")
        }
        | {"base": base_digest(folder / "base"), "model": Model.find(str(folder / "model")).digest}
        | {"weights of the registry": weights_digest(open_storage(str(folder / "model")))}
    )


def where() -> dict[str, str]:
    """What floating-point results depend on to the last bit, beside the code."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    processor = " ".join(fields.get(name, "") for name in ("vendor_id", "cpu family", "model"))
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "processor": f"{platform.machine()} {processor}".strip(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Trainings: the stored ones continued, and new ones on the stored datasets


def trainings(folder: Path, out: Path) -> dict[str, LearnerOptions | AdapterOptions]:
    """By name, with the first steps already in `out/NAME` of those that continue."""
    found: dict[str, LearnerOptions | AdapterOptions] = {}
    for name in TRAININGS:
        record = json.loads((folder / name / "training.json").read_text())
        kind = {"learner": LearnerOptions, "adapter": AdapterOptions}[record["stage"]]
        shutil.copytree(folder / name, out / name)
        begun = int(next((folder / name).glob("checkpoints/step-*")).name.removeprefix("step-"))
        found[name] = _for_test(TypeAdapter(kind).validate_python(record["config"]), out / name, begun + CONTINUED)
    data = {"data": str(folder / "dataset"), "train": TrainOptions(lr=1e-3, ema_decay=0.9)}
    contrast = ContrastOptions(queue_size=24, temperature=0.1, momentum=0.9, batch_block=4, batch_negatives=True)
    learner = LearnerOptions(**data, model=LearnerModelOptions(preset="tiny", norm_group=2), contrast=contrast)
    adapter = AdapterOptions(
        **data, learner=str(folder / "learner"), base=str(folder / "base"), model=AdapterModelOptions(preset="tiny"),
        diffusion=DiffusionOptions(lr_crop=12, noise_guidance=0.5, snr_gamma=5.0),
    )  # fmt: skip
    found["new_learner"] = _for_test(learner, out / "new_learner", 20, global_batch_size=8, micro_batch_size=4)
    found["new_adapter"] = _for_test(adapter, out / "new_adapter", 20, global_batch_size=4, micro_batch_size=2)
    latents = replace(adapter, data=str(folder / "latents"))
    found["latents"] = _for_test(latents, out / "latents", 4, global_batch_size=4, micro_batch_size=2)
    return found


def _for_test(options: Any, out: Path, steps: int, **changes: Any) -> Any:
    changes |= {"max_steps": steps, "log_every": 1, "checkpoint_every": steps}
    return replace(options, out=str(out), train=replace(options.train, **changes))


@contextmanager
def running(folder: Path, out: Path) -> Iterator[dict[str, Group]]:
    """All trainings at once, each in a process."""
    groups = {name: Group(options, 1) for name, options in trainings(folder, out).items()}
    try:
        yield groups
    finally:
        for group in groups.values():
            group.kill()


def losses(group: Group) -> list[list[float]]:
    """[step, loss] of each step, when the training has ended."""
    group.finish()
    return group.curve()


def expectations(folder: Path) -> dict[str, Any]:
    """What the things give here and now."""
    from jobs.job_file import load_job_files

    with running(folder, folder / "continued") as groups:
        curves = {name: losses(group) for name, group in groups.items()}
    shutil.rmtree(folder / "continued")
    datasets = ("dataset", "hr_from", "latents")
    return {
        "where": where(),
        "digests": digests(folder),
        "samples": {name: samples_digest(Dataset.open(str(folder / name))) for name in datasets},
        "entrypoints": {
            path.stem: load_job_files(path)[0].entrypoint for path in sorted((folder / "jobs").glob("*.yaml"))
        },
        "losses": curves,
    }
