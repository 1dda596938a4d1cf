"""What a machine, a place for results, a tracking server and a cluster can do for the commands, and what they lack."""

import os
import platform
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from deedsr.errors import DeeDSRError, UsageError
from pipelines import machine
from pipelines.dashboard import Dashboard, token_file
from pipelines.placement import Nodes, Offer, place_networks, place_shards
from pipelines.storage import open_storage
from pipelines.storage.errors import Conflict
from pipelines.storage.waiting import within
from pipelines.tracking.store import connect, experiment_id, masked_uri, sqlite_path, tracking_uri
from pipelines.training.config import ContrastOptions, TrainOptions
from pipelines.training.placement import place_training
from pipelines.training.schedules import PRESETS

GIB, MIB = 1 << 30, 1 << 20
LIBRARIES = ("torch", "diffusers", "numpy", "pillow", "opencv-python-headless", "simplejpeg")
PIPELINE = ("ray", "deepspeed", "webdataset", "mlflow", "boto3")
_STORAGE_SECONDS = 30.0  # that a place for results is given to answer
_LEAST_DISK, _LEAST_SHARED = 5 * GIB, 64 * MIB


@dataclass
class Check:
    """One thing that was looked at. `remedy` is empty where nothing is to be done."""

    name: str
    found: str
    ok: bool = True
    remedy: str = ""

    def __str__(self) -> str:
        state = "ok" if self.ok else "BROKEN"
        return f"{state:<7} {self.name:<22} {self.found}" + (f"\n{'':<31}-> {self.remedy}" if self.remedy else "")


def examine(out: str | None, address: str | None) -> list[Check]:
    """Checks everything that commands depend on; never raises for what is broken.

    `out`: a place for results, None = the working directory; `address`: of a Ray dashboard, None = no cluster.
    """
    here = machine.this_machine()
    return [
        *_versions(),
        *_machine(here),
        *_devices(),
        *_plans(here),
        *_disks(out),
        *_storage(out or "."),
        *_tracking(),
        *_cluster(address),
    ]


def _versions() -> Iterator[Check]:
    yield Check("system", f"{platform.platform(terse=True)}, Python {platform.python_version()}")
    yield Check("deedsr", _version("deedsr") or "not installed: a source tree")
    for name in LIBRARIES:
        found = _version(name)
        yield Check(name, found or "missing", found is not None, "" if found else "pip install deedsr")
    lacking = [name for name in PIPELINE if find_spec(name) is None]
    there = ", ".join(f"{name} {_version(name)}" for name in PIPELINE if name not in lacking)
    found = there + ("; " if there and lacking else "") + (f"without {', '.join(lacking)}" if lacking else "")
    remedy = "only `upscale` and `export` work; for everything else: pip install 'deedsr[pipeline]'" if lacking else ""
    yield Check("pipeline", found, remedy=remedy)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine(here: machine.Machine) -> Iterator[Check]:
    limits = machine.control_group_limits()
    quota = "no limit" if limits.cpus is None else f"{limits.cpus:g}"
    memory = "no limit" if limits.memory is None else f"{limits.memory / GIB:.1f} GiB"
    yield Check("CPUs", f"{here.cpus} to use (affinity {len(machine.allowed_cpus())}, control group {quota})")
    yield Check("memory", f"{here.memory / GIB:.1f} GiB to use (control group {memory})")


def _devices() -> Iterator[Check]:
    try:
        import torch

        names = [torch.cuda.get_device_properties(number) for number in range(machine.gpus())]
    except Exception as error:  # a driver that does not fit raises whatever it likes
        yield Check(
            "GPUs", _said(error), False, "see what `nvidia-smi` says, and install a torch built for that driver"
        )
        return
    found = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in names)
    if torch.backends.mps.is_available():
        found = "Apple MPS (--device mps, untried)"
    if not found and torch.version.cuda is None and Path("/dev/nvidiactl").exists():
        yield Check("GPUs", "a driver, but torch is built without CUDA", False, "install a torch built for CUDA")
        return
    yield Check("GPUs", found or "none that torch can use")


def _plans(here: machine.Machine) -> Iterator[Check]:
    """Where each command would run with default options."""
    try:
        gpus = machine.gpus()
    except Exception:  # reported by `_devices`
        gpus = 0
    offer = Offer((Nodes(here.cpus, gpus),), (), True, here.memory, here.shared_memory)
    for stage, presets in PRESETS.items():
        for name, values in presets.items():
            unit = ContrastOptions(**values["contrast"]).batch_block if stage == "learner" else 1
            plan = place_training(offer, TrainOptions(**values["train"]), unit)
            yield Check(f"train {stage} {name}", str(plan))
    yield Check("latents, upscale --ray", str(place_networks(offer, "auto", None, "latents")))
    yield Check("shards", str(place_shards(offer, None)))


def _disks(out: str | None) -> Iterator[Check]:
    cache = machine.cache_folder()
    places = {"temporary files": Path(tempfile.gettempdir()), "cache": cache}
    if not out or "://" not in out or out.lower().startswith("file:"):
        places["results"] = Path(open_storage(out or ".").uri)
    for name, place in places.items():
        there = next((folder for folder in (place, *place.parents) if folder.is_dir()), place)
        free = shutil.disk_usage(there).free
        found = f"{free / GIB:.1f} GiB free in {place}"
        if not os.access(there, os.W_OK):
            remedy = "set XDG_CACHE_HOME to one that you may write" if name == "cache" else "choose another folder"
            yield Check(name, f"{place} cannot be written", False, remedy)
        elif free < _LEAST_DISK:
            yield Check(name, found, False, f"free some: at least {_LEAST_DISK / GIB:.0f} GiB are advised")
        else:
            yield Check(name, found)
    shared = machine.this_machine().shared_memory
    enough = shared >= _LEAST_SHARED
    remedy = "" if enough else "start the container with --ipc=host or --shm-size=1g"
    yield Check("shared memory", f"{shared / GIB:.2f} GiB free", enough, remedy)


def _storage(out: str) -> Iterator[Check]:
    """Writes, replaces under a condition, lists and deletes an object."""
    name = f"doctor-{uuid.uuid4().hex[:12]}"
    step = "write"
    try:
        storage = open_storage(out)
        with within(_STORAGE_SECONDS):
            storage.require_writable()
        before = storage.write(name, b"first", expected=None)
        step = "conditional put"
        try:
            storage.write(name, b"second", expected=None)
        except Conflict:
            storage.write(name, b"second", expected=before)
        else:
            raise UsageError("the storage replaced an object in spite of the condition that there is none")
        step = "list"
        if name not in [entry.path for entry in storage.list()]:
            raise UsageError("an object that was just written is not listed: use storage with consistent listings")
        step = "delete"
        storage.delete(name)
        if storage.exists(name):
            raise UsageError("a deleted object is still there: use storage with consistent listings")
    except (DeeDSRError, OSError, ModuleNotFoundError) as error:
        need = "; conditional writes are needed, which S3 and local disks have" if step == "conditional put" else ""
        yield Check("storage", f"{_masked(out)}: {step} failed", False, _said(error) + need)
        return
    yield Check("storage", f"{_masked(storage.uri)}: write, conditional put, list, delete")


def _tracking() -> Iterator[Check]:
    if find_spec("mlflow") is None:
        return
    try:
        uri = tracking_uri()
        if (path := sqlite_path(uri)) and not path.exists():
            there = next(folder for folder in path.parents if folder.is_dir())
            if os.access(there, os.W_OK):
                yield Check("MLflow", f"{path} does not exist yet; the first run creates it")
            else:
                yield Check("MLflow", f"{there} cannot be written", False, "set MLFLOW_TRACKING_URI to another store")
            return
        client = connect(uri)
        run = client.create_run(experiment_id(client, uri, "deedsr-doctor"), run_name="doctor")
        client.set_terminated(run.info.run_id)
        client.delete_run(run.info.run_id)
    except DeeDSRError as error:
        yield Check("MLflow", "not usable", False, _said(error))
        return
    except Exception as error:  # whatever the store's server answers
        yield Check("MLflow", _said(error), False, "correct MLFLOW_TRACKING_URI and its login")
        return
    yield Check("MLflow", f"{_masked(uri)}: reached, a run written and deleted")


def _cluster(address: str | None) -> Iterator[Check]:
    yield from _token(bool(address))
    if not address:
        return
    place = _masked(address)
    try:
        jobs = Dashboard(address).jobs()
    except Exception as error:  # of Ray's client, too
        yield Check("cluster", f"{place}: not usable", False, _said(error))
    else:
        yield Check("cluster", f"{place}: reached, {len(jobs)} jobs")


def _token(needed: bool) -> Iterator[Check]:
    """Where the token of clusters is, without showing it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        yield Check("token", "in RAY_AUTH_TOKEN")
        return
    path = token_file()
    copy = f"copy the cluster's token to {path}"
    try:
        empty = not path.read_bytes().strip()
    except OSError as error:
        if os.environ.get("RAY_AUTH_TOKEN_PATH") or not isinstance(error, FileNotFoundError):
            yield Check("token", f"{path}: {error.strerror}", False, copy)
        elif needed:
            yield Check("token", f"no {path}", remedy=f"if the cluster asks for one, {copy}")
        return
    if empty:
        yield Check("token", f"{path} is empty", False, copy)
    elif _others_may_read(path):
        yield Check("token", f"other users of this machine may read {path}", False, f"chmod 600 {path}")
    else:
        yield Check("token", f"{path}, for nobody else to read")


def _others_may_read(path: Path) -> bool:
    """Whether the modes of a file and of the folders above it let users in who do not own it."""
    if not path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        return False
    return all(folder.stat().st_mode & (stat.S_IXGRP | stat.S_IXOTH) for folder in path.resolve().parents)


def _said(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"this needs {(error.name or '').partition('.')[0]}: pip install 'deedsr[pipeline]'"
    return _masked(" ".join(str(error).split()) or type(error).__name__)[:500]


def _masked(text: str) -> str:
    """`text` without passwords in URIs, and without what secret variables of the environment hold."""
    for name, value in os.environ.items():
        if re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY", name) and not name.endswith("_PATH") and len(value) > 5:
            text = text.replace(value, "***")
    return masked_uri(text)
