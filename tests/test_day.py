"""A day with the documents: every command line of docs/clusters.md and docs/data.md, as it stands there.

Lines are those of fenced blocks, and of code within the text that names a command with something behind it. What of
them differs here is in VALUES; what cannot run on one machine is in ELSEWHERE, with the reason.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import boto3
import cv2
import pytest
import yaml
from mlflow import MlflowClient
from ray_head import ROOT, Head, running
from tunnel import Tunnel

PAGES = ("clusters.md", "data.md")
MLFLOW = "127.0.0.7"  # of this machine; job files name the port 5000 of a host
HEAD = "RAY_AUTH_MODE=token ray start --head"

# What stands in the documents -> what it is here, by whole words.
VALUES = {
    "s3://b/": "s3://bbb/",  # names of buckets have three letters or more
    "--source ... --out ...": "--source photos --out planned --recipe small.yaml",
    "--recipe deedsr": "--recipe small.yaml",
    "--workers 8": "--workers 2",
    "[--older 1h]": "--older 1h",
    "--preset tiny": "--preset tiny --config short.yaml",
    "SHARDS": "s3://bucket/shards",
    "OLD": "s3://bucket/shards",
    "NEW": "s3://bucket/new",
    "PAIRS": "s3://bucket/pairs",
    "LATENTS": "s3://bucket/latents",
    "BASE": "tiny",
    "LEARNER": "learner",
}
# Options of a small chain on CPUs.
TRAIN = {"num_workers": 1, "global_batch_size": 32, "checkpoint_every": 2, "log_every": 1, "validate_every": 0}
SHORT = {
    "learner": {"train": TRAIN | {"max_steps": 4}},
    "adapter": {"train": TRAIN | {"max_steps": 2, "global_batch_size": 8}},
    "evaluate": {"metrics": "psnr,ssim", "limit": 1, "steps": 2},
}

SUBMITTING = [
    "ray get-auth-token --generate > /dev/null",
    "chmod 600 ~/.ray/auth_token",
    "ray get-auth-token --generate > /dev/null && chmod",
    HEAD,
    "cp jobs/site.example.yaml jobs/site.yaml",
    "deedsr doctor --out s3://bucket/prefix --address",
    "deedsr submit jobs/shards.yaml --address",
    "deedsr submit jobs/shards.yaml",
    "deedsr submit --stop ID",
    "deedsr submit jobs/shards.yaml --wait",
    "RAY_AUTH_MODE=token ray job submit",
    "deedsr runs close-stale [--older 1h]",
]
CHAIN_AS_A_JOB = ["deedsr submit jobs/chain.yaml", "deedsr submit --stop ID", "deedsr submit --follow ID"]
CHAIN = ["deedsr chain --shards.source photographs"]
REGENERATING = [
    "deedsr shards --source photos --source",
    "deedsr verify s3://bucket/shards --replay 100",
    "deedsr inspect s3://bucket/shards --out",
    "deedsr shards --source ... --out ... --plan",
    "deedsr shards --hr-from SHARDS --out NEW",
    "deedsr inspect NEW --against OLD --out",
    "deedsr inspect NEW --against OLD",
    "deedsr shards --join NEW --out PAIRS",
    "deedsr shards --source HR --pairs LR",
    "deedsr latents --data SHARDS",
    "deedsr shards --gc --dry-run --out SHARDS",
    "deedsr shards --gc --out SHARDS",
]
ELSEWHERE = {
    "deedsr COMMAND --help": "stands for each command; tests/test_cli.py looks at the help of all",
    "deedsr doctor --address": "an option that is mentioned; the whole line is run",
    "ray up ray_cluster.yaml": "starts nodes of AWS",
    "ray dashboard ray_cluster.yaml": "forwards to a node of AWS",
    "ray down ray_cluster.yaml": "ends nodes of AWS",
    "install -D -m 600 -o root node.env": "writes into the system; tests/test_clusters.py checks the unit",
    "cp infra/ray-node.service": "writes into the system",
    "systemctl ": "needs systemd as the first process",
    "docker ": "needs Docker",
    "cp infra/mlflow.env.example": "for Docker; tests/test_mlflow_behind_tls.py fills it in",
    "source .venv/bin/activate": "for the lines with sbatch",
    "export MLFLOW_TRACKING_URI": "for the lines with sbatch",
    "sbatch ": "needs Slurm: tests/test_slurm.py",
}


def documented() -> list[str]:
    """The command lines of the pages, without comments."""
    lines = []
    for page in PAGES:
        text = (ROOT / "docs" / page).read_text()
        found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        blocks = [block for language, block in found if not language and not block.startswith("server {")]  # of nginx
        lines += [re.sub(r"\s+#\s.*", "", line) for block in blocks for line in block.splitlines() if line.strip()]
        plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        lines += re.findall(r"`(deedsr (?:runs )?[\w-]+ [^`\n]+)`", plain)
    return lines


LINES = documented()


def line_of(begins: str) -> str:
    """The documented line that is `begins`, or the only one that begins so."""
    found = {line for line in LINES if line == begins} or {line for line in LINES if line.startswith(begins)}
    assert len(found) == 1, (begins, found)
    return found.pop()


def test_every_line_of_the_documents_is_run_here_or_said_to_be_elsewhere():
    run = {line_of(begins) for begins in (*SUBMITTING, *CHAIN_AS_A_JOB, *CHAIN, *REGENERATING)}
    assert [line for line in LINES if line not in run and not line.startswith(tuple(ELSEWHERE))] == []
    assert [begins for begins in ELSEWHERE if not any(line.startswith(begins) for line in LINES)] == []
    assert [line for line in run if line.startswith(tuple(ELSEWHERE))] == []


def as_here(line: str, values: dict[str, str]) -> str:
    for word, value in (VALUES | values).items():
        line = re.sub(rf"(?<![\w/]){re.escape(word)}(?!\w)" if word[-1].isalnum() else re.escape(word), value, line)
    return line


class Shell:
    """Runs documented lines in a copy of the project. `variables`: of its environment."""

    def __init__(self, folder: Path, variables: dict[str, str]):
        self.folder, self.variables = folder, variables
        self.run_lines: set[str] = set()
        self.log = ""

    def start(self, begins: str, more: str = "", **values: str) -> subprocess.Popen:
        self.run_lines.add(begins)
        line = f"{as_here(line_of(begins), values)} {more}".strip()
        return subprocess.Popen(
            ["bash", "-c", line], cwd=self.folder, env=self.variables, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, begins: str, more: str = "", exit_code: int = 0, **values: str) -> str:
        """What it prints; its log is in `log`."""
        with self.start(begins, more, **values) as process:
            output, self.log = process.communicate(timeout=1500)
        assert process.returncode == exit_code, f"{process.args[-1]}\n{output}\n{self.log}"
        assert "Traceback" not in self.log
        assert "internal error" not in self.log
        return output

    def json(self, begins: str, more: str = "", exit_code: int = 0, **values: str) -> dict:
        return json.loads(self.run(begins, f"{more} --json", exit_code, **values))


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    address = f"http://{MLFLOW}:5000"
    words = ["--host", MLFLOW, "--port", "5000", "--workers", "1", "--allowed-hosts", "*"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "mlflow", "server", *words], stdout=log, stderr=log)
    try:
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
        yield address
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="module")
def copy(photos, small_recipe, tmp_path_factory) -> Path:
    """The project as somebody has it, with few small photographs, a recipe for them, and S3 with more."""
    folder = tmp_path_factory.mktemp("day") / "deedsr"
    for name in ("deedsr", "pipelines", "jobs", "infra"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "site.yaml"))
    shutil.copy(ROOT / ".gitignore", folder)
    fields = small_recipe.model_dump(mode="json")
    fields["crop"] |= {"per_source": 1}
    (folder / "small.yaml").write_text(yaml.safe_dump(fields))
    (folder / "short.yaml").write_text(yaml.safe_dump(SHORT))
    chosen = [*sorted((photos / "train").glob("*.jpg"))[:6], *sorted((photos / "validation").glob("*.jpg"))[:2]]
    for number, path in enumerate(chosen):
        image = cv2.resize(cv2.imread(str(path)), (320, 240), interpolation=cv2.INTER_AREA)
        place = f"{path.parent.name}/{path.name}"
        for kind in ("photos", "photographs"):
            (folder / kind / path.parent.name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / kind / place), image)
        for kind, scale in (("HR", 1), ("LR", 4)):
            (folder / kind).mkdir(exist_ok=True)
            size = (320 // scale, 240 // scale)
            cv2.imwrite(str(folder / kind / f"{number}.png"), cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    return folder


@pytest.fixture(scope="module")
def s3(s3_server, copy):
    """Buckets of the day and of the job files' site, each with photographs."""
    client = boto3.client("s3")
    for bucket in ("bbb", "photos", "bucket"):
        client.create_bucket(Bucket=bucket)
        for path in (copy / "photos").rglob("*.jpg"):
            client.upload_file(str(path), bucket, f"photographs/{path.relative_to(copy / 'photos')}")
    for path in sorted((copy / "photos" / "train").iterdir())[:1]:
        client.upload_file(str(path), "bucket", f"more/{path.name}")
    return client


@pytest.fixture(scope="module")
def head(s3) -> Iterator[Head]:
    with running(Head(cpus=2, line=line_of(HEAD))) as head:
        yield head


@pytest.fixture
def shell(head, copy, mlflow) -> Shell:
    """Of somebody who has the head's token, and whose site names S3 and MLflow."""
    shell = Shell(copy, head.shell | {"RAY_API_SERVER_ADDRESS": head.address, "MLFLOW_TRACKING_URI": mlflow})
    shell.run("cp jobs/site.example.yaml jobs/site.yaml")
    site = copy / "jobs" / "site.yaml"
    site.write_text(site.read_text().replace("mlflow.internal", MLFLOW))
    return shell


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_submit_stop_correct_and_submit_again(head, shell, copy, s3, tmp_path):
    fresh = Shell(copy, os.environ | {"HOME": str(tmp_path)})
    token = tmp_path / ".ray" / "auth_token"
    for lines in (SUBMITTING[:2], SUBMITTING[2:3]):
        for begins in lines:
            fresh.run(begins)
        assert (token.stat().st_mode & 0o777, len(token.read_text().strip()) >= 32) == (0o600, True)
        token.unlink()
    here = {"http://127.0.0.1:8265": head.address}
    assert shell.json("deedsr doctor --out s3://bucket/prefix --address", **here)["broken"] == []

    # A mistake, which is in the log once; a stop; and the right one.
    submit = "deedsr submit jobs/shards.yaml --address"
    shell.json(submit, "--set source=s3://photos/photograph --set recipe=small.yaml", exit_code=1, **here)
    assert shell.log.count("error: ") == 1
    small = "--set recipe=small.yaml"
    started = shell.json("deedsr submit jobs/shards.yaml", small)
    assert shell.json("deedsr submit --stop ID", ID=started["job_id"])["status"] == "STOPPED"
    assert shell.json("deedsr submit jobs/shards.yaml --wait", small)["status"] == "SUCCEEDED"
    shell.run("RAY_AUTH_MODE=token ray job submit", "--recipe small.yaml --tracking false", **here)
    digests = {json.loads(s3.get_object(Bucket=bucket, Key=f"{key}/manifest.json")["Body"].read())["digest"]
               for bucket, key in (("photos", "shards/deedsr"), ("bbb", "shards"))}  # fmt: skip
    assert len(digests) == 1
    assert shell.json("deedsr runs close-stale [--older 1h]")["closed"] == []
    assert fresh.run_lines | shell.run_lines | {HEAD} == set(SUBMITTING)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_chain_is_stopped_and_continues_through_a_broken_tunnel_and_on_a_new_head(head, shell, s3, mlflow):
    shell.run_lines.clear()
    changes = {"preset": "tiny", "base": "tiny", "shards.recipe": "small.yaml", "latents.device": "cpu"}
    changes |= {"evaluate.device": "cpu", "latents.precision": "fp32"}
    for name, values in SHORT.items():
        changes |= {f"{name}.train.{key}": value for key, value in values.get("train", {}).items()}
    changes |= {f"{name}.train.gpus_per_worker": 0 for name in ("learner", "adapter")}
    changes |= {"adapter.train.zero_stage": 0, "adapter.train.precision": "fp32", "learner.train.max_steps": 100_000}
    changes |= {"evaluate.metrics": "'\"psnr,ssim\"'", "evaluate.limit": 1, "evaluate.steps": 2}

    def steps() -> list[int]:
        found = s3.list_objects_v2(Bucket="photos", Prefix="chain/learner/checkpoints/").get("Contents", [])
        return sorted(int(entry["Key"].split("step-")[1][:8]) for entry in found if "checkpoint.json" in entry["Key"])

    def submit() -> str:
        sets = " ".join(f"--set {key}={value}" for key, value in changes.items())
        return shell.json("deedsr submit jobs/chain.yaml", sets)["job_id"]

    def parents() -> list[str]:
        client = MlflowClient(mlflow)
        chain = client.get_experiment_by_name("deedsr-chain").experiment_id
        return [run.info.status for run in client.search_runs([chain])]

    first = submit()
    deadline = time.monotonic() + 900
    while not steps():
        assert time.monotonic() < deadline
        assert head.get(f"/api/jobs/{first}")["status"] in ("PENDING", "RUNNING")
        time.sleep(1)
    assert shell.json("deedsr submit --stop ID", ID=first)["status"] == "STOPPED"
    assert parents() == ["KILLED"]

    changes["learner.train.max_steps"] = steps()[-1] + 2
    second = submit()
    with (
        Tunnel(head.address) as tunnel,
        shell.start("deedsr submit --follow ID", f"--address {tunnel.address} --json", ID=second) as following,
    ):
        lines = iter(following.stderr)
        next(line for line in lines if "chain: 2 of 5, learner" in line)
        tunnel.cut()
        next(line for line in lines if "lost the connection" in line)
        tunnel.mend()
        log, output = "".join(lines), following.stdout.read()
        following.wait(60)
    assert (following.returncode, json.loads(output)["status"]) == (0, "SUCCEEDED"), log
    assert "connected again" in log
    assert parents() == ["FINISHED"]

    head.stop()
    head.start()
    head.wait_until_ready()
    assert submit() != second  # which it has forgotten
    third = submit()
    with shell.start("deedsr submit --follow ID", ID=third) as following:
        _, log = following.communicate(timeout=900)
    assert following.returncode == 0, log
    assert re.findall(r"chain: (\w+) skipped", log) == ["shards", "learner", "latents", "adapter", "evaluate"]
    assert parents() == ["FINISHED"]
    assert shell.run_lines == set(CHAIN_AS_A_JOB)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_chain_on_this_machine(copy, tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    shell = Shell(copy, os.environ | {"MLFLOW_TRACKING_URI": store})
    result = shell.json(CHAIN[0], "--shards.recipe small.yaml")
    assert (result["learner"]["step"], result["adapter"]["step"], result["skipped"]) == (4, 2, [])
    assert (copy / "runs" / "chain" / "evaluation" / "results.json").exists()
    assert shell.run_lines == set(CHAIN)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_regenerating_in_all_ways_and_collecting_what_is_left(copy, s3, stored, tmp_path):
    shutil.copytree(stored.folder / "learner", copy / "learner")
    shell = Shell(copy, os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"})
    generate, derive, collect = REGENERATING[0], REGENERATING[4], REGENERATING[-1]
    planned = shell.json("deedsr shards --source ... --out ... --plan")
    made = shell.json(generate)
    assert (planned["sources"] + 1, made["written"], made["reused"]) == (9, made["shards"], 0)
    again = shell.json(generate)
    assert (again["digest"], again["written"]) == (made["digest"], 0)
    assert shell.json("deedsr verify s3://bucket/shards --replay 100")["replayed"] == made["samples"]
    shell.json("deedsr inspect s3://bucket/shards --out")
    assert s3.head_object(Bucket="bucket", Key="pages/shards.html")["ContentLength"]

    derived = shell.json(derive)
    assert 4 * derived["samples"] == made["samples"]  # `heavy` has one variant
    shell.run("deedsr inspect NEW --against OLD --out")
    assert (copy / "changes.html").exists()
    shell.run("deedsr inspect NEW --against OLD", f"--out {tmp_path}/page.html --tracking false")
    assert shell.json("deedsr shards --join NEW --out PAIRS")["samples"] == derived["samples"]
    pairs = shell.json("deedsr shards --source HR --pairs LR", "--recipe small.yaml", SHARDS="s3://bucket/real")
    assert pairs["rejected"] == 0
    assert shell.json("deedsr latents --data SHARDS")["samples"] == made["samples"]

    # Another recipe into the same place: the older version stays for what was made of it.
    small = yaml.safe_load((copy / "small.yaml").read_text())
    (copy / "small.yaml").write_text(yaml.safe_dump(small | {"seed": 1}))
    other = shell.json(generate)
    assert (other["digest"] != made["digest"], other["reused"]) == (True, 0)
    listed = shell.json("deedsr shards --gc --dry-run --out SHARDS")
    assert sorted(listed["held_by"]) == ["s3://bucket/latents", "s3://bucket/new"]
    assert listed["bytes"] > 0
    shell.run(collect, exit_code=1)
    assert "s3://bucket/new" in shell.log
    for entry in s3.list_objects_v2(Bucket="bucket", Prefix="latents/")["Contents"]:
        s3.delete_object(Bucket="bucket", Key=entry["Key"])
    assert shell.json(derive)["reused"] == 0
    assert shell.json(collect)["removed_objects"] >= len(listed["would_remove"])
    assert shell.json("deedsr verify s3://bucket/shards --replay 100")["ok"]
    assert shell.run_lines == set(REGENERATING)
