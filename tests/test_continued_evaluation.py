"""Claims on evaluations that are interrupted, repeated, changed, or started twice into one place."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from evaluations import actors, assert_same, evaluate
from small_networks import make_pipeline

from deedsr.errors import UsageError
from jobs.cli import main
from pipelines.claims import Claim, Superseded, held
from pipelines.storage import open_storage

pytestmark = pytest.mark.usefixtures("own_store")


def measured(out: Path) -> list[Path]:
    """Records of samples that are measured."""
    return list(out.glob("_state/evaluation/*/[!.]*.json"))


def status_of(out: Path) -> tuple[str, str]:
    """MLflow run of an evaluation, and its status."""
    from mlflow import MlflowClient

    from pipelines import tracking

    run_id = json.loads((out / "_state" / "evaluation.json").read_text())["run_id"]
    return run_id, MlflowClient(tracking.tracking_uri()).get_run(run_id).info.status


def test_an_interrupted_evaluation_continues_to_the_figures_of_an_undisturbed_one(
    evaluated, model, small_dataset, tmp_path, capsys
):
    words = ["evaluate", "--model", model, "--data", small_dataset, "--out", str(tmp_path), "--limit", "6"]
    refused = []

    def interrupt() -> None:
        while len(measured(tmp_path)) < 2:
            time.sleep(0.005)
        try:
            Claim(open_storage(tmp_path)).take()
        except UsageError as error:
            refused.append(str(error))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as of a process that is one command
    killer = threading.Thread(target=interrupt, daemon=True)
    killer.start()
    try:
        assert main([*words, "--seed", "3"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted; the same command continues where it stopped" in capsys.readouterr().err
    assert f"{tmp_path} is being written by" in refused[0]
    run_id, status = status_of(tmp_path)
    assert status == "KILLED"
    times = {path: path.stat().st_mtime_ns for path in measured(tmp_path)}
    assert 2 <= len(times) < 6

    assert main([*words, "--seed", "3"]) == 0
    assert times.items() <= {path: path.stat().st_mtime_ns for path in measured(tmp_path)}.items()
    assert status_of(tmp_path) == (run_id, "FINISHED")
    assert_same(tmp_path, evaluated[0])


def test_a_refused_evaluation_leaves_nothing_behind(model, small_dataset, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="no GPU"):
        evaluate(model, small_dataset, str(out), limit=2, device="cuda", progress=False)
    assert not out.exists() or list(out.iterdir()) == []


def test_a_finished_evaluation_is_not_repeated(evaluated, model, small_dataset):
    out, result, _ = evaluated
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != "claim.json"}
    assert evaluate(model, small_dataset, str(out), limit=6, seed=3, progress=False) == result
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != "claim.json"} == before


def test_only_what_is_the_same_is_continued(model, small_dataset, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    other_model = tmp_path / "other-model"
    make_pipeline("kl", num_inference_steps=2).save_pretrained(other_model)
    out = tmp_path / "out"
    runs: set[str] = set()

    def reused(alone: bool = False, **changes) -> int:
        caplog.clear()
        options = {
            "model": model,
            "data": small_dataset,
            "limit": 2,
            "metrics": ["psnr"],
            "progress": False,
        } | changes
        result = evaluate(out=str(out), **options)
        assert status_of(out) == (result.run_id, "FINISHED")
        runs.add(result.run_id)
        assert len({path.parent for path in measured(out)}) == 1
        said = re.search(r"(\d+) of \d+ samples are measured already", caplog.text)
        if alone:
            evaluate(out=str(tmp_path / "alone"), **options)
            assert_same(out, tmp_path / "alone")
        return int(said[1]) if said else 0

    assert reused() == 0
    assert reused(limit=4, alone=True) == 2
    assert reused(limit=4, experiment="another") == 4
    (out / "pictures" / f"{measured(out)[0].stem}.lr.png").unlink()
    assert reused(limit=4, experiment="another") == 3
    assert reused(steps=1) == 0
    assert reused(steps=1, seed=1) == 0
    assert reused(steps=1, seed=1, metrics=["ssim"]) == 0
    assert reused(steps=1, seed=1, metrics=["ssim"], model=str(other_model), alone=True) == 0
    assert len(runs) == 7


def test_a_second_evaluation_into_the_same_place_is_refused(evaluated, model, small_dataset):
    out, _, results = evaluated
    with held(Claim(open_storage(out))), pytest.raises(UsageError, match=rf"is being written by .*{os.getpid()}"):
        evaluate(model, small_dataset, str(out), limit=1, progress=False)
    assert json.loads((out / "results.json").read_text()) == results


def test_an_evaluation_that_another_command_has_replaced_writes_nothing_more(model, small_dataset, tmp_path):
    def replace() -> None:
        while not measured(tmp_path):
            time.sleep(0.005)
        claim = json.loads((tmp_path / "claim.json").read_text())
        open_storage(tmp_path).write("claim.json", json.dumps(claim | {"command": "another"}).encode())

    thread = threading.Thread(target=replace, daemon=True)
    thread.start()
    with pytest.raises(Superseded, match="works in .* in place of this command"):
        evaluate(model, small_dataset, str(tmp_path), limit=24, metrics=["psnr"], progress=False)
    thread.join()
    assert not (tmp_path / "results.json").exists()
    assert len(measured(tmp_path)) < 24
    assert status_of(tmp_path)[1] == "RUNNING"  # it is the other's run now
    assert json.loads((tmp_path / "claim.json").read_text())["command"] == "another"


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_command_on_a_cluster_ends_it_and_it_continues(
    on_cluster, model, small_dataset, tmp_path, number
):
    words = ["evaluate", "--model", model, "--data", small_dataset, "--limit", "24", "--steps", "10"]
    words += ["--device", "cpu", "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "deedsr", *words, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True,
        # Tests that a shell runs in the background have SIGINT ignored, and what they start would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while len(measured(tmp_path / "out")) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "interrupted; the same command continues where it stopped" in said
    assert "Traceback" not in said
    run_id, status = status_of(tmp_path / "out")
    assert status == "KILLED"
    assert 2 <= len(measured(tmp_path / "out")) < 24
    deadline = time.monotonic() + 30
    while working := actors():
        assert time.monotonic() < deadline, working
        time.sleep(0.2)
    assert main([*words, str(tmp_path / "out")]) == 0
    assert status_of(tmp_path / "out") == (run_id, "FINISHED")
    assert main([*words, str(tmp_path / "undisturbed")]) == 0
    assert_same(tmp_path / "out", tmp_path / "undisturbed")
