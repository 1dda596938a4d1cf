"""What this machine lets a process use: CPUs, memory, shared memory, GPUs, locks, a cache. The only module
that queries the system, and the only one that uses what some systems lack.

A container, a batch system or `taskset` may allow less than the hardware has; what they allow is what counts.
`DEEDSR_CPUS` sets the number of CPUs by hand: to leave some to other work, or to try out another machine.
"""

import contextlib
import errno
import getpass
import math
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from deedsr.errors import UsageError

CPUS_VARIABLE = "DEEDSR_CPUS"


@dataclass(frozen=True)
class Machine:
    """What may be used here. Sizes in bytes."""

    cpus: int  # at least 1
    memory: int
    shared_memory: int  # free in /dev/shm, or in the temporary folder where the system has none


@dataclass(frozen=True)
class Limits:
    """What the control groups of a process allow; None = no limit."""

    cpus: float | None = None  # processor seconds per second
    memory: int | None = None  # bytes


def this_machine() -> Machine:
    """Raises UsageError if `DEEDSR_CPUS` is not a whole number above 0."""
    import psutil

    wanted = os.environ.get(CPUS_VARIABLE)
    if wanted and (not wanted.isdecimal() or int(wanted) < 1):
        raise UsageError(f"{CPUS_VARIABLE} must be a whole number of CPUs, 1 or more, got {wanted!r}")
    limits = control_group_limits()
    cpus = len(allowed_cpus())
    if limits.cpus is not None:
        cpus = min(cpus, max(1, math.floor(limits.cpus)))
    memory = psutil.virtual_memory().total
    shared = Path("/dev/shm")
    return Machine(
        cpus=int(wanted) if wanted else cpus,
        memory=min(memory, limits.memory or memory),
        shared_memory=shutil.disk_usage(shared if shared.is_dir() else tempfile.gettempdir()).free,
    )


def allowed_cpus() -> set[int]:
    """Numbers of the CPUs that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def gpus() -> int:
    """GPUs that torch can use here; `CUDA_VISIBLE_DEVICES` counts."""
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA, Windows' subsystem for Linux, AMD
    if sys.platform == "linux" and not any(map(os.path.exists, drivers)):
        return 0  # without the seconds that torch takes to be imported
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_memory() -> int:
    """Bytes of the smallest GPU that this process sees; 0 without one."""
    import torch

    return min((torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())), default=0)


def lock(file: IO[Any], wait: bool = True, shared: bool = False) -> bool:
    """Takes the lock of an open file until that is closed; False if another has it and not `wait`.

    It is exclusive, or `shared` with others that take it so (on Windows, which has none, that does nothing).
    """
    if sys.platform == "win32":
        import msvcrt

        if shared:
            return True
        while True:
            try:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError:
                if not wait:
                    return False
                time.sleep(0.05)
            else:
                return True
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def cache_folder() -> Path:
    """Folder of what can be made or fetched again: `$XDG_CACHE_HOME`, else `~/.cache`.

    Below the temporary folder where there is no home that can be written, as in containers under a numeric user.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    with contextlib.suppress(OSError, RuntimeError):  # the latter: the user has no home at all
        folder = Path.home() / ".cache"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    user = os.getuid() if hasattr(os, "getuid") else 0  # Windows has none
    folder = Path(tempfile.gettempdir()) / f"deedsr-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # Somebody else's folder of this name is not trusted.
    return folder if folder.stat().st_uid == user else Path(tempfile.mkdtemp(prefix="deedsr-"))


def may_read(path: str | Path) -> bool:
    """Whether this process may read a file."""
    return os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


def opened_file(path: str, flags: int) -> int:
    """An opener of files alone: FileNotFoundError for a pipe, which would wait for a writer, a socket or a device."""
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno != errno.ENXIO:  # of a socket
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, "Not a regular file", path)


def user_name() -> str:
    """Of this process's user; the number where the system has no name, as in containers under a numeric user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def process_space() -> str:
    """The space in which a process id is unique: this boot of this machine, and in it this container."""
    import psutil

    try:
        return f"{_text(Path('/proc/sys/kernel/random/boot_id'))} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def runs(pid: int, since: float) -> bool:
    """Whether the process that had this id at a time (seconds since 1970) still runs, in this space of processes."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # it exists and belongs to another user
        return True


def environment_number(variable: str, default: float, unit: str) -> float:
    """What a variable of the environment sets, 0 or more. Raises UsageError if it holds no such number."""
    text = os.environ.get(variable) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0:
        raise UsageError(f"{variable} must be a number of {unit}, 0 or more, got {text!r}")
    return number


def control_group_limits(
    membership: Path = Path("/proc/self/cgroup"), hierarchies: Path = Path("/sys/fs/cgroup")
) -> Limits:
    """Limits of the control groups (v2, v1 or both at once) that this process and their ancestors are in.

    Args:
        membership: which groups: lines `ID:CONTROLLERS:PATH`, where v2's line is `0::PATH`.
        hierarchies: folder in which the hierarchies are mounted.
    """
    cpus: list[float] = []
    memory: list[int] = []
    for controllers, group in _groups(membership, hierarchies):
        if not controllers:
            quota, _, period = _text(group / "cpu.max").partition(" ")
            cpus += _quotient(quota, period)
            memory += _bytes(_text(group / "memory.max"))
        elif "cpu" in controllers:
            cpus += _quotient(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))
        elif "memory" in controllers:
            memory += _bytes(_text(group / "memory.limit_in_bytes"))
    return Limits(min(cpus, default=None), min(memory, default=None))


def memory_kills(
    membership: Path = Path("/proc/self/cgroup"), hierarchies: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")
) -> int:
    """How many processes the kernel has killed so far because memory ran out: in these control groups, or, where they
    have no limit, on the whole machine."""
    counts = [_text(proc / "vmstat")] if control_group_limits(membership, hierarchies).memory is None else []
    for controllers, group in _groups(membership, hierarchies):
        if not controllers or "memory" in controllers:
            counts.append(_text(group / ("memory.oom_control" if controllers else "memory.events")))
    return sum(int(count) for text in counts for count in re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE))


def _groups(membership: Path, hierarchies: Path) -> Iterator[tuple[list[str], Path]]:
    """Controllers, none for v2, and folder of each group of this process and of their ancestors."""
    for line in _text(membership).splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if not controllers:
            roots = [hierarchies, hierarchies / "unified"]
        else:
            known = [name for name in ("cpu", "memory") if name in controllers.split(",")]
            together = hierarchies / controllers  # v1: named after all controllers, or after one of them by a link
            roots = [together if together.is_dir() else hierarchies / known[0]] if known else []
        for root in roots:
            for group in _ancestry(root, path):
                yield controllers.split(",") if controllers else [], group


def _ancestry(root: Path, path: str) -> Iterator[Path]:
    """The groups from `root` down to `path`, as far as they are visible: a container sees its own as the root."""
    yield root
    for part in PurePosixPath(path.lstrip("/")).parts:
        root = root / part
        if part == ".." or not root.is_dir():
            return
        yield root


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _quotient(quota: str, period: str) -> list[float]:
    """CPUs of a quota and its period in microseconds; none for `max`, -1 and what is no number."""
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return []
    return [int(quota) / int(period)]


def _bytes(text: str) -> list[int]:
    """A memory limit; `max` and v1's largest number of pages are none."""
    return [int(text)] if text.isdecimal() and int(text) < 1 << 62 else []
