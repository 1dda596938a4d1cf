"""Claims on the shards job when processes die: one digest, whatever is killed and on however many nodes it runs."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.data.dataset import Dataset
from pipelines.shards import collect_garbage, verify

DRIVER = Path(__file__).parent / "shard_driver.py"


@pytest.fixture(scope="module")
def digest(small_dataset) -> str:
    return Dataset.open(small_dataset).digest


def drive(photos, out, recipe, *, nodes=1, victim="none", seed=0) -> subprocess.CompletedProcess:
    arguments = [str(photos), str(out), json.dumps(recipe.model_dump(mode="json")), str(nodes), victim, str(seed)]
    return subprocess.run([sys.executable, str(DRIVER), *arguments], capture_output=True, text=True, timeout=280)


def printed_digest(run: subprocess.CompletedProcess) -> str:
    """What the driver printed last, or what it says of its failure; Ray prints lines of its own."""
    return (re.findall(r"^[0-9a-f]{64}$", run.stdout, re.MULTILINE) or [run.stderr])[-1]


@pytest.mark.soak
def test_digest_is_the_same_on_three_nodes_of_which_one_is_killed(photos, small_recipe, tmp_path, digest):
    run = drive(photos, tmp_path / "out", small_recipe, nodes=3, victim="node")
    assert "killed a node" in run.stderr
    assert printed_digest(run) == digest
    assert not (tmp_path / "out" / "_state" / "attempts").exists()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_digest_is_the_same_after_twenty_kills_of_workers_nodes_and_drivers(photos, small_recipe, tmp_path, digest):
    rng = random.Random(20)
    finished = killed = 0
    while killed < 20:
        out = tmp_path / f"out-{finished}"
        while True:  # until the job comes to its end, the same command again after every death of its driver
            victim = rng.choice(["worker", "node", "driver"])
            run = drive(photos, out, small_recipe, nodes=2, victim=victim, seed=rng.randrange(1000))
            killed += "killed" in run.stderr
            if run.returncode == 0:
                break
            assert "killed the driver" in run.stderr, run.stderr
        assert printed_digest(run) == digest
        assert verify(str(out), replay=5, progress=False).ok
        collect_old(out)
        assert {p.name for p in out.glob("*.tar")} == {shard.name for shard in Dataset.open(str(out)).manifest.shards}
        shutil.rmtree(out)
        finished += 1
    assert finished >= 3


def collect_old(out: Path) -> None:
    """Garbage collection as of ten minutes later, when the claims of killed runs have expired."""
    for claim in out.glob("_state/runs/*/claim.json"):
        claim.write_text(json.dumps(json.loads(claim.read_text()) | {"alive": 0}))
    collect_garbage(str(out))
