"""What a machine, a place for results, a tracking server and a cluster can do for the commands, and what they lack."""

import os
import platform
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from deedsr.errors import DeeDSRError, UsageError
from pipelines import machine
from pipelines.placement import Nodes, Offer, place_networks, place_shards, place_training
from pipelines.storage import open_storage
from pipelines.storage.errors import Conflict
from pipelines.storage.waiting import within
from pipelines.training.config import PRESETS, ContrastOptions, TrainOptions

__all__ = ["Check", "examine"]

GIB, MIB = 1 << 30, 1 << 20
LIBRARIES = ("torch", "diffusers", "numpy", "pillow", "opencv-python-headless", "simplejpeg")
PIPELINE = {"ray": "ray", "deepspeed": "deepspeed", "webdataset": "webdataset", "mlflow": "mlflow", "boto3": "boto3"}
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
    """Looks at everything that commands depend on; never raises for what is broken.

    Args:
        out: a place for results, folder or s3://bucket/prefix; None = the working directory.
        address: of a Ray cluster's dashboard, http(s)://...; None = no cluster.
    """
    here = machine.this_machine()
    looks: list[Callable[[], Iterator[Check]]] = [
        _versions,
        lambda: _machine(here),
        _devices,
        lambda: _plans(here),
        lambda: _disks(out),
        lambda: _storage(out or "."),
        _tracking,
        lambda: _cluster(address),
    ]
    found: list[Check] = []
    for look in looks:
        found += look()
    return found


def _versions() -> Iterator[Check]:
    yield Check("system", f"{platform.platform(terse=True)}, Python {platform.python_version()}")
    yield Check("deedsr", _version("deedsr") or "not installed: a source tree")
    for name in LIBRARIES:
        found = _version(name)
        yield Check(name, found or "missing", found is not None, "" if found else "pip install deedsr")
    lacking = [name for name, module in PIPELINE.items() if find_spec(module) is None]
    there = ", ".join(f"{name} {_version(name)}" for name in PIPELINE if name not in lacking)
    found = there + ("; " if there and lacking else "") + (f"without {', '.join(lacking)}" if lacking else "")
    remedy = "only `upscale` works; for everything else: pip install 'deedsr[pipeline]'" if lacking else ""
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
        offer = Offer((Nodes(here.cpus, machine.gpus()),), (), True, here.memory, here.shared_memory)
    except Exception:  # said by `_devices`
        offer = Offer((Nodes(here.cpus),), (), True, here.memory, here.shared_memory)
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
            yield Check(name, found, False, f"free some: {_LEAST_DISK / GIB:.0f} GiB are a sensible least")
        else:
            yield Check(name, found)
    shared = machine.this_machine().shared_memory
    enough = shared >= _LEAST_SHARED
    remedy = "" if enough else "start the container with --ipc=host or --shm-size=1g"
    yield Check("shared memory", f"{shared / GIB:.2f} GiB free", enough, remedy)


def _storage(out: str) -> Iterator[Check]:
    """Writes, replaces under a condition, lists and deletes an object."""
    name = f"doctor-{uuid.uuid4().hex[:12]}"
    done = ""
    try:
        storage = open_storage(out)
        with within(_STORAGE_SECONDS):
            storage.require_writable()
        done = "write"
        before = storage.write(name, b"first", expected=None)
        done = "conditional put"
        try:
            storage.write(name, b"second", expected=None)
        except Conflict:
            storage.write(name, b"second", expected=before)
        else:
            raise UsageError("a conditional put replaced an object that it expected not to be there")
        done = "list"
        if name not in [entry.path for entry in storage.list()]:
            raise UsageError("an object that was just written is not listed")
        done = "delete"
        storage.delete(name)
        if storage.exists(name):
            raise UsageError("a deleted object is still there")
    except (DeeDSRError, OSError) as error:
        remedy = "use storage with conditional writes, such as S3 or a local disk" if done == "conditional put" else ""
        yield Check("storage", f"{done or 'open'}: {_said(error)}", False, remedy or "see the message")
        return
    yield Check("storage", f"{_masked(storage.uri)}: write, conditional put, list, delete")


def _tracking() -> Iterator[Check]:
    if find_spec("mlflow") is None:
        return
    from pipelines.tracking.store import connect, experiment_id, sqlite_path, tracking_uri

    try:
        uri = tracking_uri()
        if (path := sqlite_path(uri)) and not path.exists():
            there = next(folder for folder in path.parents if folder.is_dir())
            may = os.access(there, os.W_OK)
            remedy = "" if may else "set MLFLOW_TRACKING_URI to a store that you may write"
            yield Check("MLflow", f"{path} would be made" + ("" if may else ", which is not allowed"), may, remedy)
            return
        client = connect(uri)
        run = client.create_run(experiment_id(client, uri, "deedsr-doctor"), run_name="doctor")
        client.set_terminated(run.info.run_id)
        client.delete_run(run.info.run_id)
    except Exception as error:  # whatever the store's server says
        yield Check("MLflow", _said(error), False, "start the server, or correct MLFLOW_TRACKING_URI and its login")
        return
    yield Check("MLflow", f"{_masked(uri)}: reached, a run written and deleted")


def _cluster(address: str | None) -> Iterator[Check]:
    token = os.environ.get("RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if token:
        yield Check("token", "in RAY_AUTH_TOKEN")
    elif path.is_file():
        shared = bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))
        yield Check("token", f"{path}", not shared, f"others may read it: chmod 600 {path}" if shared else "")
    elif address:
        yield Check("token", "none", remedy="ray get-auth-token --generate, or copy the cluster's to ~/.ray/auth_token")
    if not address:
        return
    try:
        yield Check("cluster", _reach(address))
    except Exception as error:  # of Ray's client: connection, token, version
        yield Check("cluster", _said(error), False, f"start it, or the tunnel to {_masked(address)}, and its token")


def _reach(address: str) -> str:
    from pipelines.cluster import dashboard

    return f"{address}: {len(dashboard(address).list_jobs())} jobs listed"


def _said(error: BaseException) -> str:
    return _masked(" ".join(str(error).split()) or type(error).__name__)[:500]


def _masked(text: str) -> str:
    """`text` without passwords in URIs, and without what secret variables of the environment hold."""
    for name, value in os.environ.items():
        if re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY", name) and not name.endswith("_PATH") and len(value) > 5:
            text = text.replace(value, "***")
    return re.sub(r"://[^/@\s\"']+@", "://***@", text)
