"""`python -m benchmarks.gpu` on a CPU at its tiny size: every kind of measurement gives numbers, and what was measured
before a stop is kept. `make test` has one arm of each kind that needs no Ray; `make soak` all of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_process import run_script

from benchmarks.gpu import ARMS

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
RUNS = [{"steps": 3}, {"steps": 3, "stop": 2}]
KINDS = {  # one of each
    "losses": {"stage": "learner", "micro": 32, "precision": "bf16", "zero": 2, "runs": RUNS},
    "train": {"stage": "adapter", "micro": 2, "loop": "engine", "zero": 2, "precision": "bf16", "seconds": 0},
    "latents": {"micro": 1, "precision": "fp32", "seconds": 0},
    "sampling": {"side": 32, "pictures": 2, "steps": 2, "precision": "fp32"},
    "depthwise": {"micro": 2, "precision": "fp32", "seconds": 0},
}


# As `python -m benchmarks.gpu_tasks`, in a process that has imported the libraries.
TASK = """
import runpy
runpy.run_module("benchmarks.gpu_tasks", run_name="__main__")
"""


@pytest.mark.parametrize("task", KINDS)
def test_a_task_of_each_kind_gives_finite_numbers(task, tmp_path):
    asked = {"size": "tiny", "work": str(tmp_path)} | KINDS[task]
    printed = run_script(TASK, 1, [task, json.dumps(asked)], tmp_path)
    [line] = [line for line in printed.splitlines() if line.startswith("ANSWER")]
    answer = json.loads(line.removeprefix("ANSWER"))
    assert answer.pop("finite")
    assert answer
    assert all(len(curve) == 3 for curve in answer.get("losses", []))


@pytest.mark.soak
def test_what_was_measured_is_kept_when_the_script_is_stopped(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--arms", "sampling", "latents", "--work", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, text=True) as script:
        until = time.monotonic() + 200
        while len(rows(tmp_path)) < 2 and script.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        script.send_signal(signal.SIGINT)
    about, sampled = rows(tmp_path)[:2]
    assert about["torch"]
    assert sampled["arm"] == "sampling"
    assert sampled["seconds"] > 0


def rows(work: Path) -> list[dict]:
    results = work / "results.jsonl"
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_on_a_cpu(arm, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--arms", arm, "--work", str(tmp_path), "--minutes", "25"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1700)
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row for row in result["rows"] if "failed" in row] == []
    assert [row for row in result["rows"] if not row.get("ok", True)] == []
    assert done.returncode == 0
