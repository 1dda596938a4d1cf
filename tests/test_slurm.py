"""infra/slurm.sbatch on a Slurm cluster of two nodes, which are hosts in network namespaces."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import hosts
import pytest
import yaml
from hosts import ADDRESSES, BIN, Network, Process

ROOT = Path(__file__).parent.parent
NODES = ("node1", "node2")
DAEMONS = ("munged", "slurmctld", "slurmd")
pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

CONFIGURATION = """
ClusterName=test
SlurmctldHost=head({addresses[head]})
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=10
SchedulerParameters=sched_interval=1
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=node1 NodeAddr={addresses[node1]} CPUs=2 RealMemory=2000
NodeName=node2 NodeAddr={addresses[node2]} CPUs=2 RealMemory=2000
PartitionName=all Nodes=node1,node2 Default=YES
"""


class Slurm:
    """The cluster. `folder` is shared by its nodes; commands of Slurm run on the host `head`."""

    def __init__(self, network: Network, folder: Path):
        self.network, self.folder = network, folder
        self.conf = folder / "slurm.conf"
        self.conf.write_text(CONFIGURATION.format(folder=folder, addresses=ADDRESSES))
        (folder / "munge").mkdir(mode=0o755)
        (folder / "munge" / "key").write_bytes(b"k" * 64)
        (folder / "munge" / "key").chmod(0o600)
        (folder / "state").mkdir()
        for name in ("head", "mlflow", *NODES):
            network[name].boot()
        munge = [f"--{what}={folder}/munge/{place}" for what, place in
                 (("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"),
                  ("seed-file", "seed"))]  # fmt: skip
        daemons = [self._start("head", "munged", "--foreground", "--force", *munge)]
        self._wait(lambda: (folder / "munge" / "socket").exists(), daemons)
        store = [BIN / "mlflow", "server", "--host", ADDRESSES["mlflow"], "--port", "5000", "--workers", "1"]
        store += ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "artifacts"]
        daemons.append(network["mlflow"].start(*store, "--allowed-hosts", "*", log="server"))
        daemons.append(self._start("head", "slurmctld", "-D", "-f", str(self.conf)))
        daemons += [self._start(name, "slurmd", "-D", "-N", name, "-f", str(self.conf)) for name in NODES]
        self._wait(lambda: self.run("sinfo", "--noheader", "--format=%D %t") == "2 idle\n", daemons)
        curl = ("curl", "--silent", "--fail", f"{hosts.MLFLOW}/health")
        self._wait(lambda: self.run(*curl) == "OK", daemons)

    def _start(self, host: str, daemon: str, *words: str) -> Process:
        return self.network[host].start(f"/usr/sbin/{daemon}", *words, log=daemon, SLURM_CONF=str(self.conf))

    def _wait(self, true: Callable[[], bool], daemons: list[Process]) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with suppress(AssertionError):
                if true():
                    return
            ended = [daemon.log.read_text() for daemon in daemons if not daemon.running()]
            assert not ended, ended
            time.sleep(0.5)
        raise AssertionError([daemon.log.read_text() for daemon in daemons])

    def run(self, *words: str) -> str:
        """What a command prints."""
        process = self.network["head"].start(*words, log="client", SLURM_CONF=str(self.conf))
        assert process.popen.wait(60) == 0, process.log.read_text()
        return process.output.read_text()

    def submit(self, *words: str) -> str:
        """Submits infra/slurm.sbatch, as it is, with a command of deedsr; returns the job's number."""
        options = ["--parsable", "--cpus-per-task=2", f"--chdir={self.folder}"]
        return self.run("sbatch", *options, str(ROOT / "infra" / "slurm.sbatch"), *words).strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", number).split() if "=" in word)

    def log(self, number: str) -> str:
        path = self.folder / f"deedsr-{number}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, number: str, true: Callable[[], bool], seconds: float = 300) -> None:
        """Until `true()`, while the job waits or runs."""
        deadline = time.monotonic() + seconds
        while not true():
            state = self.job(number)["JobState"]
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"{state}: {self.log(number)}"
            assert time.monotonic() < deadline, self.log(number)
            time.sleep(0.5)

    def finish(self, number: str) -> None:
        self.wait(number, lambda: self.job(number)["JobState"] == "COMPLETED")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    if reason := hosts.unsupported():
        pytest.skip(reason)
    if any(shutil.which(daemon, path="/usr/sbin") is None for daemon in DAEMONS):
        pytest.skip("no Slurm on this machine (Debian: slurmctld, slurmd, slurm-client, munge)")
    with Network(tmp_path_factory.mktemp("hosts")) as network:
        yield Slurm(network, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def dataset(slurm, photos, small_recipe) -> Path:
    """Shards that a job on both nodes made."""
    recipe = slurm.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe.model_dump(mode="json")))
    out = slurm.folder / "shards"
    number = slurm.submit("shards", "--source", str(photos), "--out", str(out), "--recipe", str(recipe), "--json")
    slurm.finish(number)
    (out / "job.log").write_text(slurm.log(number))
    return out


def test_a_slurm_job_makes_the_shards_of_one_machine(slurm, dataset, photos, tmp_path):
    [result] = [json.loads(line) for line in (dataset / "job.log").read_text().splitlines() if line.startswith("{")]
    words = [BIN / "deedsr", "shards", "--source", photos, "--out", tmp_path / "here", "--json"]
    here = subprocess.run([*words, "--recipe", slurm.folder / "recipe.yaml"], capture_output=True, check=True)
    assert result["digest"] == json.loads(here.stdout)["digest"]


def test_a_training_continues_after_the_notice_before_its_time_limit_and_after_a_requeue(slurm, dataset):
    out = slurm.folder / "learner"
    number = slurm.submit(
        "train", "learner", "--preset=tiny", f"--data={dataset}", f"--out={out}", "--train.num_workers=2",
        "--train.gpus_per_worker=0", "--train.max_steps=24", "--train.checkpoint_every=4", "--train.log_every=1",
        "--json",
    )  # fmt: skip

    def steps() -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in (out / "checkpoints").glob("step-*"))

    slurm.wait(number, lambda: bool(steps()))
    slurm.run("scancel", "--batch", "--signal=USR1", number)  # what Slurm sends two minutes before the time limit
    slurm.wait(number, lambda: slurm.job(number)["Restarts"] == "1")
    saved = steps()[-1]
    assert "interrupted" in slurm.log(number)
    slurm.wait(number, lambda: steps()[-1] > saved)
    slurm.run("scontrol", "requeue", number)
    slurm.finish(number)
    assert slurm.job(number)["Restarts"] == "2"
    [result] = [json.loads(line) for line in slurm.log(number).splitlines() if line.startswith("{")]
    assert result["step"] == 24


def test_a_cancelled_job_is_not_queued_again_and_a_wrong_option_ends_it_with_exit_2(slurm, dataset):
    number = slurm.submit("verify", str(dataset))
    slurm.wait(number, lambda: slurm.job(number)["JobState"] == "RUNNING")
    slurm.run("scancel", number)
    time.sleep(15)
    assert slurm.job(number)["JobState"] == "CANCELLED"
    number = slurm.submit("shards", "--nonsense")
    with pytest.raises(AssertionError, match="FAILED"):
        slurm.finish(number)
    assert slurm.job(number)["ExitCode"] == "2:0"
