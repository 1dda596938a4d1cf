"""What a process may use here, from made-up control groups of both kinds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deedsr.errors import UsageError
from pipelines import machine
from pipelines.machine import Limits, Machine, control_group_limits, this_machine

ROOT = Path(__file__).parent.parent


def group(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        pytest.param("0::/", {"cpu.max": "400000 100000", "memory.max": "8589934592"}, Limits(4.0, 8 << 30),
                     id="v2, as a container sees it"),
        pytest.param("0::/", {"cpu.max": "max 100000", "memory.max": "max"}, Limits(), id="v2 without limits"),
        pytest.param("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "300000 100000",
                                 "a/b/memory.max": "max", "a/memory.max": "1073741824"}, Limits(1.5, 1 << 30),
                     id="v2, the strictest of the ancestors"),
        pytest.param("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n1:name=systemd:/",
                     {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "50000",
                      "memory/memory.limit_in_bytes": "2147483648"}, Limits(4.0, 2 << 30),
                     id="v1, whose own groups the container sees as the root"),
        pytest.param("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x",
                     {"cpu/docker/x/cpu.cfs_quota_us": "50000", "cpu/docker/x/cpu.cfs_period_us": "100000",
                      "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
                      "memory/docker/x/memory.limit_in_bytes": "9223372036854771712"}, Limits(0.5),
                     id="v1 on the host, linked by one name"),
        pytest.param("5:memory:/m\n0::/u", {"memory/m/memory.limit_in_bytes": "1048576",
                                            "unified/u/cpu.max": "800000 100000"}, Limits(8.0, 1 << 20),
                     id="both at once"),
        pytest.param("0::/../../outside", {"cpu.max": "100000 100000"}, Limits(1.0), id="above the own root"),
        pytest.param("nonsense\n::\n0::/", {"cpu.max": "", "memory.max": "much"}, Limits(), id="unreadable"),
        pytest.param("", {}, Limits(), id="no control groups"),
    ],
)  # fmt: skip
def test_limits_of_control_groups(tmp_path, membership, files, expected):
    (tmp_path / "cgroup").write_text(membership)
    group(tmp_path / "fs", files)
    assert control_group_limits(tmp_path / "cgroup", tmp_path / "fs") == expected


def test_what_a_container_allows_counts_and_not_what_the_hardware_has(monkeypatch):
    monkeypatch.delenv(machine.CPUS_VARIABLE, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(machine, "control_group_limits", lambda: Limits(4.9, 123456789))
    assert (this_machine().cpus, this_machine().memory) == (4, 123456789)
    monkeypatch.setattr(machine, "control_group_limits", lambda: Limits(0.5))
    assert this_machine().cpus == 1
    monkeypatch.setattr(machine, "control_group_limits", Limits)
    assert this_machine().cpus == 64
    assert this_machine().memory > 1 << 28
    assert this_machine().shared_memory > 0


def test_the_number_of_cpus_can_be_set_by_hand(monkeypatch):
    monkeypatch.setenv(machine.CPUS_VARIABLE, "16")
    assert this_machine().cpus == 16
    for wrong in ("0", "-2", "four", "2.5"):
        monkeypatch.setenv(machine.CPUS_VARIABLE, wrong)
        with pytest.raises(UsageError, match="DEEDSR_CPUS must be a whole number"):
            this_machine()


def test_hidden_gpus_are_none():
    words = [sys.executable, "-c", "from pipelines import machine; print(machine.gpus())"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_nothing_else_asks_the_system_how_large_it_is():
    asking = re.compile(r"sched_getaffinity|cpu_count|cpu_affinity|cluster_resources\(|device_count\(")
    product = [
        path for folder in ("deedsr", "pipelines", "jobs", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    found = [f"{path.relative_to(ROOT)}" for path in product if asking.search(path.read_text())]
    assert found == ["pipelines/machine.py"]


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        pytest.param("0::/a", {"memory.max": "9", "memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 1"}, 2,
                     id="v2"),
        pytest.param("4:memory:/docker/x", {"memory/memory.limit_in_bytes": "9",
                     "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4"}, 4, id="v1"),
        pytest.param("0::/", {"memory.max": "max", "memory.events": "oom_kill 0"}, 7, id="no limit: the whole machine"),
        pytest.param("", {}, 7, id="no control groups"),
    ],
)  # fmt: skip
def test_processes_that_were_killed_for_want_of_memory_are_counted(tmp_path, membership, files, expected):
    (tmp_path / "cgroup").write_text(membership)
    group(tmp_path / "fs", files)
    group(tmp_path / "proc", {"vmstat": "nr_free_pages 5\noom_kill 7\nballoon_inflate 0"})
    assert machine.memory_kills(tmp_path / "cgroup", tmp_path / "fs", tmp_path / "proc") == expected


def test_a_task_of_ray_data_is_quoted_without_ray_data_s_advice():
    from pipelines import cluster

    said = (
        "ray::FlatMap()\n  File 'x', line 1\nAway: cannot read x\nFailed to apply UDF transform after 1/1 attempts.\n"
    )
    said += "To change retry attempts, backoff, or which errors are retried, configure it"
    assert cluster.failure_message(RuntimeError(said), "less") == "Away: cannot read x"


def test_a_worker_that_memory_killed_is_explained_by_the_limit_and_an_option(monkeypatch):
    from ray.exceptions import ActorDiedError, OutOfMemoryError

    from pipelines import cluster

    less = "fewer --workers need less"
    monkeypatch.setattr(machine, "this_machine", lambda: Machine(2, 1_500_000_000, 1 << 30))
    assert cluster.failure_message(ActorDiedError(), less) == str(ActorDiedError()).splitlines()[-1]
    expected = f"a worker was killed, because the work needed more than the 1.5 GB of memory here: {less}"
    assert cluster.failure_message(OutOfMemoryError("Task was killed due to the node running low"), less) == expected
    monkeypatch.setattr(cluster, "_kills", machine.memory_kills() - 1)  # one since this process connected
    assert cluster.failure_message(ActorDiedError(), less) == expected
