"""What must not change unnoticed: digests, the results and exit codes of commands, the figures of `tiny`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from command_results import RESULTS, differences
from stored_things import restore_store

from benchmarks.tiny_crops import read_crops
from benchmarks.tiny_figures import degraded
from deedsr import DeeDSRPipeline
from deedsr.metrics import niqe, psnr_y
from jobs import cli
from pipelines.data.dataset import Dataset
from pipelines.shards import generate

SMALL = "06859a9061a671965f7ee998546f9e4b9a3e4c55c931116f0d0fb6241e4c60ec"  # by `small_recipe` of conftest.py
DEMO = "5e7c6264d0f8b89e7678b945c1f499ae626d2dafb19acc6f987975af02e90cda"  # by the recipe of `deedsr demo`


# ---------------------------------------------------------------------------------------------------------------------
# Digests of the shipped photographs; whoever changes one on purpose raises ALGORITHM_VERSION or the recipe's default


def test_the_shipped_photographs_have_their_digest(small_dataset):
    assert Dataset.open(small_dataset).digest == SMALL


@pytest.mark.soak
def test_the_shipped_photographs_have_their_digest_in_the_demo(ray_cluster, photos, tmp_path):
    from deedsr.dataset.recipe import load_recipe

    result = generate([str(photos)], str(tmp_path), load_recipe("demo"), workers=2, progress=False)
    assert result.digest == DEMO


# ---------------------------------------------------------------------------------------------------------------------
# Results of commands. Those of `chain`, `latents` and `submit` are looked at in the tests of these.


@pytest.fixture(scope="module")
def things(stored, tmp_path_factory):
    """A copy of the stored things and of their MLflow store that commands may write to, as the working directory."""
    folder = tmp_path_factory.mktemp("things")
    for name in ("dataset", "sources", "recipe.yaml", "base", "init", "learner", "model", "pictures", "upscaled"):
        path = stored.folder / name
        shutil.copytree(path, folder / name) if path.is_dir() else shutil.copy(path, folder / name)
    for name in ("learner", "model"):
        shutil.copy(stored.folder / f"{name}.yaml", folder)
    restore_store(stored, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield folder


REUSED = "shards --source sources --recipe recipe.yaml --out dataset"
ADAPTER = "train adapter --config model.yaml --data dataset --out model --learner learner --base base --init init"
COMMANDS = {
    "shards": REUSED,
    "shards --plan": "shards --source sources --recipe recipe.yaml --out planned --plan --price 1",
    "shards --source --gc": f"{REUSED} --gc --tracking false",
    "shards --gc": "shards --out dataset --gc",
    "verify": "verify dataset --replay 2",
    "inspect": "inspect dataset --out inspection.html --samples 2",
    "train learner": "train learner --config learner.yaml --data dataset --out learner",
    "train adapter": ADAPTER,
    "evaluate": "evaluate --model model --data dataset --out evaluation --metrics psnr,ssim --limit 1",
    "upscale": "upscale pictures --out upscaled --model model",
    "export": "export model --out pipeline",
    "compare": "compare --out comparison.html",
    "runs list": "runs list --last 3",
    "runs show": "runs show learner",
    "doctor": "doctor",
}
ELSEWHERE = {"chain", "demo", "latents", "runs close-stale", "submit", "submit --wait"}


def test_the_result_of_every_command_is_looked_at():
    assert COMMANDS.keys() | ELSEWHERE == RESULTS.keys()
    assert {" ".join(word for word in name.split() if not word.startswith("--")) for name in RESULTS} == set(
        cli.COMMANDS
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_result_has_its_keys_and_types(things, capsys, name):
    code = cli.main([*COMMANDS[name].split(), "--json"])
    captured = capsys.readouterr()
    assert code == 0 or name == "doctor", captured.err  # which may find this machine lacking
    result = json.loads(captured.out)
    # NIQE needs larger pictures than the stored ones; without tracking there is no run.
    absent = {"evaluate": "niqe is missing", "shards --source --gc": "run_id is missing"}.get(name, "nothing")
    assert [line for line in differences(name, result) if not line.endswith(absent)] == []


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_result_of_the_demo_has_its_keys_and_types(tmp_path):
    words = ["demo", "--out", str(tmp_path), "--learner-steps", "4", "--adapter-steps", "4", "--json"]
    done = subprocess.run([sys.executable, "-m", "deedsr", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert differences("demo", json.loads(done.stdout)) == []


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("verify --help", 0),
        ("verify dataset", 0),
        ("verify damaged", 1),
        ("verify sources", 1),  # no dataset
        ("upscale pictures damaged --out enlarged --model model", 1),  # one of them is no picture
        ("train learner --data sources --out new", 1),
        ("nonsense", 2),
        ("verify", 2),
        ("verify dataset --nonsense 1", 2),
        ("verify dataset --replay many", 2),
        ("verify dataset --config nowhere.yaml", 2),
        ("shards --source nowhere --out new", 2),
        ("shards --source sources --out new --recipe nonsense", 2),
        ("train learner --config learner.yaml --data dataset --out learner --train.lr 1", 2),  # another training's
        ("train adapter --config model.yaml --data dataset --out new --learner nowhere --base base", 2),
        ("evaluate --model model --data dataset --out new --metrics nonsense", 2),
        ("upscale nowhere --out new", 2),
        ("export model --out dataset", 2),  # holds something
        ("compare --experiment nonsense", 2),
        ("submit nowhere.yaml", 2),
    ],
)
def test_a_command_has_its_exit_code(things, capsys, words, code):
    if not (things / "damaged").exists():
        shutil.copytree(things / "dataset", things / "damaged")
        tar = next((things / "damaged").glob("*.tar"))
        tar.write_bytes(tar.read_bytes()[:-1000] + b"x" * 1000)
        (things / "damaged" / "broken.png").write_bytes(b"no picture")
    try:
        assert cli.main(words.split()) == code, capsys.readouterr().err
    finally:
        assert not (things / "new").exists()


def test_an_interrupted_command_has_exit_code_130(tmp_path):
    os.mkfifo(tmp_path / "options.yaml")  # reading it waits for a writer
    words = ["verify", "--config", str(tmp_path / "options.yaml")]
    command = subprocess.Popen([sys.executable, "-m", "deedsr", *words], stderr=subprocess.PIPE)
    with open(tmp_path / "options.yaml", "wb"):  # waits for the reader
        time.sleep(0.1)
        command.send_signal(signal.SIGINT)
        said = command.communicate(timeout=60)[1].decode()
    assert command.returncode == 130, said
    assert said.endswith("interrupted; the same command continues where it stopped\n")


# ---------------------------------------------------------------------------------------------------------------------
# Figures of the shipped model. Kernels for other processors change them by 4e-5 dB and by 1e-3 of NIQE.

FIGURES = {  # PSNR of Y, NIQE
    "00-Green-Maple-1128-2056": (30.2970, 12.7286),
    "00-Picture_0B-154-1539": (36.5766, 11.4084),
    "00-Sea-of-Lanterns-1034-244": (27.5731, 8.6176),
}


def test_tiny_has_its_figures():
    """192 px from the middle of three validation crops, degraded at DeeDSR's ranges."""
    pipe = DeeDSRPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for crop in read_crops()[:3]:
        pair = degraded(crop, "deedsr")
        hr, lr = pair.hr[160:352, 160:352], pair.lr[40:88, 40:88]
        picture = np.asarray(pipe(lr, generator=torch.Generator().manual_seed(0)).images[0])
        found[crop.name] = psnr_y(picture, hr, 4), niqe(picture)
    assert found == {
        name: (pytest.approx(psnr, abs=0.01), pytest.approx(score, abs=0.05)) for name, (psnr, score) in FIGURES.items()
    }
