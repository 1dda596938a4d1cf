"""A cluster of several hosts on one machine, for tests of what happens between hosts.

A host is a set of Linux namespaces (network, mounts, host name, processes) with an address, /etc/hosts, home folder,
/tmp/ray and /mnt of its own. A veth pair connects it to a bridge in another network namespace, so no interface, route
or name appears outside, networks of several test runs exist side by side, and no packet leaves any of them. Namespaces
end with their first process, which the kernel kills when the test process ends, however it ends.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ADDRESSES = {name: f"10.77.0.{number}" for number, name in enumerate(("head", "node1", "node2", "s3", "mlflow"), 1)}
S3, MLFLOW = f"http://{ADDRESSES['s3']}:5000", f"http://{ADDRESSES['mlflow']}:5000"
RAY = f"{ADDRESSES['head']}:6379"
BUCKET = "s3://bucket"
BIN = Path(sys.executable).parent
STORES = {
    "AWS_ENDPOINT_URL": S3, "AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "MLFLOW_TRACKING_URI": MLFLOW,
}  # fmt: skip
# Lines of /etc/hosts on `name` besides localhost: every host's address, what Debian's installer writes, nothing.
NAMES: dict[str, Callable[[str], list[str]]] = {
    "right": lambda name: [f"{address} {host}" for host, address in ADDRESSES.items()],
    "debian": lambda name: [f"127.0.1.1 {name}"],
    "none": lambda name: [],
}

_UNSHARE = ["setpriv", "--pdeathsig=KILL", "unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child",
            "--mount-proc"]  # fmt: skip
# The first process of the namespaces ignores SIGCHLD, so that the kernel reaps the orphans that it inherits.
_FIRST_PROCESS = "echo ready; exec env --ignore-signal=CHLD sleep infinity"
_HOST = f"""
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/resolv.conf" /etc/resolv.conf
[ ! -e /etc/nsswitch.conf ] || mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mkdir -p /tmp/ray
mount --bind "$2/ray" /tmp/ray
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /mnt
{_FIRST_PROCESS}"""


def unsupported() -> str | None:
    """The reason why this machine cannot have such hosts."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts in network namespaces need Linux and root"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(tool) is None]
    if missing:
        return f"hosts in network namespaces need {', '.join(missing)} (iproute2, util-linux)"
    links = "ip link add name port type veth peer name eth0; ip link add name bridge0 type bridge"
    tried = subprocess.run([*_UNSHARE, "sh", "-ec", f"{links}; mount --bind /tmp /tmp"], capture_output=True, text=True)
    return f"this machine refuses network namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Namespaces:
    """A process in namespaces of its own, which other processes enter. When it ends, they are killed."""

    def __init__(self, script: str, *arguments: str | Path):
        self._unshare = subprocess.Popen(
            [*_UNSHARE, "sh", "-euc", script, "sh", *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != "ready\n":
            raise OSError(f"namespaces were not set up: {self._unshare.communicate()[1]}")
        [first] = psutil.Process(self._unshare.pid).children()
        self.pid = first.pid

    def configure_network(self, *commands: str) -> None:
        """Runs commands of `ip` in the network namespace alone: process ids in them are those outside."""
        words = ["nsenter", f"--target={self.pid}", "--net", "ip", "-batch", "-"]
        subprocess.run(words, input="\n".join(commands), text=True, check=True, capture_output=True)

    def end(self) -> None:
        """Returns when no process is left in the namespaces."""
        if self._unshare.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._unshare.wait()


class Process:
    """A command that runs on a host. `log` holds its stderr, `output` its stdout."""

    def __init__(self, words: list[str], log: Path, environment: dict[str, str]):
        self.log, self.output, self.began, self.seconds = log, log.with_suffix(".out"), time.monotonic(), 0.0
        with log.open("ab") as stderr, self.output.open("wb") as stdout:
            self.popen = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )

    def running(self) -> bool:
        return self.popen.poll() is None

    def terminate(self) -> None:
        """SIGTERM to the command itself, which `nsenter` has as its child."""
        [command] = psutil.Process(self.popen.pid).children()
        command.terminate()

    def code(self, seconds: float = 900) -> int:
        """Its exit code, once it has ended."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"runs for more than {seconds:.0f} s: {self.log.read_text()[-4000:]}") from None
        finally:
            self.seconds = time.monotonic() - self.began

    def result(self, seconds: float = 900) -> dict[str, Any]:
        """What it printed as JSON. Fails if the command did."""
        code = self.code(seconds)
        assert code == 0, f"exit code {code} after {self.seconds:.0f} s: {self.log.read_text()[-4000:]}"
        return json.loads(self.output.read_text())


class Host:
    """One host, off until `boot`. Its folder is kept while it is off."""

    def __init__(self, name: str, bridge: Namespaces, folder: Path):
        self.name, self.address, self.folder = name, ADDRESSES[name], folder
        self._bridge = bridge
        self._namespaces: Namespaces | None = None
        for part in ("ray", "home", "log"):
            (folder / part).mkdir(parents=True)
        (folder / "resolv.conf").touch()  # no name server: glibc asks loopback, where none answers
        (folder / "nsswitch.conf").write_text("hosts: files dns\n")  # nor systemd, which answers by other ways
        self.set_names("right")

    def set_names(self, names: str) -> None:
        """Writes /etc/hosts: `names` is one of NAMES."""
        # Written over what is there: a running host has this file mounted.
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *NAMES[names](self.name), ""]))

    def boot(self) -> None:
        self._namespaces = Namespaces(_HOST, self.name, self.folder)
        card = f"name eth0 address {_mac(self.address)} netns {self._namespaces.pid}"
        self._bridge.configure_network(f"link add name {self.name} type veth peer {card}")
        self.mend()
        # Fixed neighbours: packets to a host that is off or cut off get no answer, as they would behind a router,
        # instead of "no route to host".
        others = [address for address in ADDRESSES.values() if address != self.address]
        self._namespaces.configure_network(
            "link set lo up",
            f"address add {self.address}/24 dev eth0",
            "link set eth0 up",
            "route add default dev eth0",  # by which Ray finds the host's own address
            *(f"neighbour add {other} lladdr {_mac(other)} dev eth0 nud permanent" for other in others),
        )

    def kill(self) -> None:
        """Kills all processes of the host and removes its network."""
        if self._namespaces is not None:
            self._namespaces.end()
            with contextlib.suppress(subprocess.CalledProcessError):  # the kernel may have been faster
                self._bridge.configure_network(f"link delete {self.name}")
            self._namespaces = None

    def cut(self) -> None:
        """Drops all packets to and from the host from now on. Its network card notices nothing."""
        self._bridge.configure_network(f"link set {self.name} nomaster")

    def mend(self) -> None:
        self._bridge.configure_network(f"link set {self.name} master bridge0 up")

    def lose(self, other: str) -> None:
        """Drops all packets to the host `other` from now on; what comes from there is received, and never answered."""
        assert self._namespaces is not None, f"{self.name} is off"
        self._namespaces.configure_network(
            f"neighbour replace {ADDRESSES[other]} lladdr {_mac('10.77.0.254')} dev eth0 nud permanent"
        )

    def processes(self, name: str) -> list[psutil.Process]:
        """Those whose command line begins with `name`."""
        if self._namespaces is None:
            return []
        here, found = os.stat(f"/proc/{self._namespaces.pid}/ns/net").st_ino, []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.stat(f"/proc/{process.pid}/ns/net").st_ino == here and "".join(process.cmdline()[:1]).startswith(
                    name
                ):
                    found.append(process)
        return found

    def start(self, *words: str | Path, log: str, **environment: str) -> Process:
        """Runs a command in the host's folder."""
        assert self._namespaces is not None, f"{self.name} is off"
        enter = ["nsenter", f"--target={self._namespaces.pid}", "--all", "env", f"--chdir={self.folder}"]
        return Process([*enter, *map(str, words)], self.folder / "log" / log, self._environment() | environment)

    def keep(self, *words: str | Path, log: str, **environment: str) -> Process:
        """Runs a command again each time that it has ended, as a service manager does."""
        return self.start("sh", "-c", 'while :; do "$@" >&2; sleep 2; done', "sh", *words, log=log, **environment)

    def _environment(self) -> dict[str, str]:
        return STORES | {
            "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": f"{self.folder}/home", "LANG": "C.UTF-8",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Moves the calling thread into the network of the host, with the threads and processes that it starts."""
        assert self._namespaces is not None, f"{self.name} is off"
        with open("/proc/thread-self/ns/net") as before, open(f"/proc/{self._namespaces.pid}/ns/net") as network:
            _enter_network(network.fileno())
            try:
                yield
            finally:
                _enter_network(before.fileno())


class Network:
    """The hosts of ADDRESSES on one bridge, by name. A context: all is removed on leaving it."""

    def __init__(self, folder: Path):
        setup = "ip link add name bridge0 type bridge; ip link set bridge0 up"
        self._bridge = Namespaces(f"{setup}; {_FIRST_PROCESS}")
        self._hosts = {name: Host(name, self._bridge, folder / name) for name in ADDRESSES}

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts.values():
            host.kill()
        self._bridge.end()


def wait_until(true: Callable[[], bool], process: Process, seconds: float = 240) -> None:
    """Until `true()`, while `process` runs."""
    deadline = time.monotonic() + seconds
    while not true():
        said = process.log.read_text()[-4000:]
        assert process.running(), f"ended too early: {said}"
        assert time.monotonic() < deadline, f"not within {seconds} s: {said}"
        time.sleep(0.3)


def _mac(address: str) -> str:
    return ":".join(f"{byte:02x}" for byte in (2, 0, *map(int, address.split("."))))


def _enter_network(descriptor: int) -> None:
    CLONE_NEWNET = 0x40000000
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):  # os.setns is there from Python 3.12 on
        raise OSError(ctypes.get_errno(), "setns failed")
