"""What a job file may hold, what its job is, and what of a working directory goes with it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deedsr.errors import UsageError
from jobs.job_file import load_job_files, suspicious
from jobs.upload import EXCLUDES, package

ROOT = Path(__file__).parent.parent
LEARNER = {
    "command": "train learner",
    "name": "learner",
    "options": {"preset": "tiny", "data": "s3://photos/shards", "out": "s3://photos/learner"},
    "runtime_env": {"env_vars": {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}},
}


def write(path: Path, job: dict) -> Path:
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def refusal(path: Path, job: dict, *settings: str) -> str:
    with pytest.raises(UsageError) as error:
        load_job_files(write(path, job), settings)
    return str(error.value)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the code, with what the README's commands write beside it."""
    for name in ("deedsr", "pipelines", "jobs", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("assets", "images", "__pycache__"))
    shutil.copy(ROOT / ".gitignore", tmp_path)
    return tmp_path


def outputs_of_the_readme() -> list[str]:
    readme = (ROOT / "README.md").read_text()
    written = re.findall(r"^deedsr .*--out (\S+)", readme, re.MULTILINE)
    assert {"shards", "runs/learner", "pipeline", "comparison.html"} <= set(written)
    return [*written, "inspection.html", "mlflow.db", "mlartifacts/1/a.png"]


def test_what_the_readme_writes_is_neither_uploaded_nor_committed_and_all_code_is(copy):
    folders = [name if "." in Path(name).name else f"{name}/0.tar" for name in outputs_of_the_readme()]
    before = package(copy, EXCLUDES, {})
    for name in folders:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"0" * 1000)
    assert package(copy, EXCLUDES, {}) == before
    subprocess.run(["git", "init", "--quiet", str(copy)], check=True)
    ignored = subprocess.run(["git", "-C", str(copy), "check-ignore", *folders], capture_output=True, text=True).stdout
    assert ignored.splitlines() == folders
    page = "pipelines/reports/templates/base.html"
    for name in ("pipelines/shards/plan.py", page, "jobs/latents.py", "deedsr/errors.py"):
        text = (copy / name).read_text()
        (copy / name).write_text(text + " ")
        assert package(copy, EXCLUDES, {}) != before, name
        (copy / name).write_text(text)
        assert subprocess.run(["git", "-C", str(copy), "check-ignore", "--quiet", name]).returncode == 1


def test_editing_a_job_file_or_a_page_of_the_docs_sends_nothing(copy):
    before = package(copy, EXCLUDES, {})
    for path in (copy / "jobs" / "learner.yaml", copy / "docs" / "data.md", copy / "jobs" / "site.yaml"):
        path.write_text("changed")
    assert package(copy, EXCLUDES, {}) == before


def test_what_is_too_large_is_named_largest_first(copy):
    for name, size in {"videos/a.mp4": 90 << 20, "videos/b.mp4": 20 << 20, "notes/plain.bin": 6 << 20}.items():
        (copy / name).parent.mkdir(exist_ok=True)
        with (copy / name).open("wb") as file:
            file.truncate(size)
    with pytest.raises(UsageError, match=r"takes 100: .*largest: videos/a.mp4 90.0 MiB, notes/plain.bin 6.0 MiB, "):
        package(copy, EXCLUDES, {})
    assert package(copy, [*EXCLUDES, "/videos"], {})


def test_a_file_that_the_job_reads_and_the_upload_lacks_is_named(copy):
    (copy / "jobs" / "mine.yaml").write_text("base: light")
    with pytest.raises(UsageError, match="options.recipe is 'jobs/mine.yaml', which is left out of the upload"):
        package(copy, EXCLUDES, {"recipe": "jobs/mine.yaml"})
    (copy / "mine.yaml").write_text("base: light")
    assert package(copy, EXCLUDES, {"recipe": "mine.yaml", "source": ["pipelines/shards"], "experiment": "x"})


def test_a_job_has_time_to_checkpoint_when_it_is_stopped(tmp_path):
    job = load_job_files(write(tmp_path / "job.yaml", LEARNER))[0]
    assert job.ray_runtime_env()["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
    longer = LEARNER | {"mlflow": "nodes", "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}}
    job = load_job_files(write(tmp_path / "job.yaml", longer))[0]
    assert job.ray_runtime_env()["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"


def test_placeholders_are_refused_and_filled_from_the_site_file_or_the_environment(tmp_path, monkeypatch):
    for path in (ROOT / "jobs").glob("*.yaml"):
        shutil.copy(path, tmp_path)
    with pytest.raises(UsageError) as error:
        load_job_files(tmp_path / "learner.yaml")
    assert "YOUR-BUCKET in options.data, options.out; YOUR-MLFLOW-HOST in runtime_env.env_vars.MLFLOW_TRACKING_URI" in (
        str(error.value)
    )
    assert f"{tmp_path}/site.yaml" in str(error.value)
    (tmp_path / "site.example.yaml").rename(tmp_path / "site.yaml")
    monkeypatch.setenv("YOUR_BUCKET", "mine")
    job = load_job_files(tmp_path / "learner.yaml")[0]
    assert job.options["data"] == "s3://mine/shards/deedsr"
    assert job.runtime_env.env_vars == {"MLFLOW_TRACKING_URI": "http://mlflow.internal:5000"}


@pytest.mark.parametrize("variables", [{}, {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}])
def test_a_run_that_would_vanish_with_the_job_is_refused_unless_the_job_says_so(tmp_path, variables):
    job = LEARNER | {"runtime_env": {"env_vars": variables}}
    assert "a working directory that vanishes with the job; name the MLflow server" in refusal(tmp_path / "j.yaml", job)
    for said in ("nodes", "none"):
        load_job_files(write(tmp_path / "job.yaml", job | {"mlflow": said}))
    options = {"source": ["s3://b/p"], "out": "s3://b/o", "tracking": False}
    load_job_files(write(tmp_path / "job.yaml", {"command": "shards", "options": options}))
    load_job_files(write(tmp_path / "job.yaml", {"command": "verify", "options": {"uri": "s3://b/o"}}))


SECRET = "ghp_" + "a1B2" * 9


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"runtime_env": {"env_vars": {"WANDB_KEY": "abc"}}}, "runtime_env.env_vars.WANDB_KEY"),
        ({"runtime_env": {"env_vars": {"DB_PASS": "abc"}}}, "runtime_env.env_vars.DB_PASS"),
        ({"runtime_env": {"env_vars": {"STORE": "http://:pw@host"}}}, "runtime_env.env_vars.STORE"),
        ({"runtime_env": {"env_vars": {"MODEL": SECRET}}}, "runtime_env.env_vars.MODEL"),
        ({"runtime_env": {"pip": [f"git+https://{SECRET}@github.com/a/b"]}}, "runtime_env.pip[0]"),
        ({"options": {"data": "https://h/x?X-Amz-Signature=abc", "out": "s3://b/o"}}, "options.data"),
        ({"options": {"data": "s3://AKIAABCDEFGHIJKLMNOP:x@b/p", "out": "s3://b/o"}}, "options.data"),
        ({"name": SECRET}, "name"),
    ],
)
def test_credentials_are_refused_anywhere_and_not_shown(tmp_path, changes, key):
    message = refusal(tmp_path / "job.yaml", LEARNER | changes)
    assert f"{key} looks like a credential" in message
    assert not re.search(r"ghp_|abc|:pw|AKIA", message)


def test_what_only_resembles_a_credential_is_none():
    harmless = {
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_AUTH_TOKEN_PATH": "/t",
        "MONKEY": "x",
        "PIP": "git+ssh://git@h/a",
    }
    harmless |= {"AWS_ENDPOINT_URL": "http://s3:9000", "data": "s3://b/a@b", "KEY": ""}
    assert list(suspicious(harmless)) == []


def test_options_that_the_command_would_refuse_are_refused_before_sending(tmp_path):
    train = {"num_workers": 3, "global_batch_size": 64}
    job = LEARNER | {"options": LEARNER["options"] | {"train": train}}
    assert "options: train.global_batch_size" in refusal(tmp_path / "job.yaml", job)
    job = {"command": "shards", "options": {"out": "s3://b/o"}, "mlflow": "nodes"}
    assert "options: give one of --source" in refusal(tmp_path / "job.yaml", job)


def test_packages_by_a_path_of_this_machine_are_refused(tmp_path):
    job = LEARNER | {"runtime_env": {"pip": ["./mine.whl"]}, "mlflow": "nodes"}
    assert "runtime_env.pip names './mine.whl', a path of this machine" in refusal(tmp_path / "job.yaml", job)


def test_options_are_set_over_those_of_the_file(tmp_path):
    path = write(tmp_path / "job.yaml", LEARNER | {"options": LEARNER["options"] | {"train": {"lr": 1e-4, "seed": 1}}})
    [job] = load_job_files(path, ["train.lr=3e-5", "out=s3://other/learner", "train.num_workers=1..2"])
    assert job.options["train"] == {"lr": "3e-5", "seed": 1, "num_workers": "1..2"}
    assert (job.name, job.options["out"]) == ("learner", "s3://other/learner")
    assert "unknown option --train.lrr = 1; did you mean --train.lr?" in refusal(path, LEARNER, "train.lrr=1")
    assert "--set takes KEY=VALUE" in refusal(path, LEARNER, "train.lr")
    assert "--set train.lr= needs a value" in refusal(path, LEARNER, "train.lr=")


def test_several_values_are_a_job_each_whose_name_and_out_say_so(tmp_path):
    path = write(tmp_path / "job.yaml", LEARNER)
    jobs = load_job_files(path, ["train.lr=1e-5,3e-5", "train.seed=1,2"])
    assert [(job.name, job.options["out"]) for job in jobs] == [
        (f"learner-lr-{lr}-seed-{seed}", f"s3://photos/learner-lr-{lr}-seed-{seed}")
        for lr in ("1e-5", "3e-5")
        for seed in (1, 2)
    ]
    assert [job.options["train"]["lr"] for job in jobs] == ["1e-5", "1e-5", "3e-5", "3e-5"]
    assert "several jobs with name learner-lr-1e-5" in refusal(path, LEARNER, "train.lr=1e-5,1e-5")


def test_a_value_with_a_comma_in_quotes_or_brackets_is_one(tmp_path):
    job = {
        "command": "evaluate",
        "options": {"model": "tiny", "data": "s3://b/d", "out": "s3://b/o"},
        "mlflow": "nodes",
    }
    [found] = load_job_files(write(tmp_path / "job.yaml", job), ['metrics="psnr,ssim"'])
    assert found.options["metrics"] == "psnr,ssim"
    shards = {"command": "shards", "options": {"out": "s3://b/o", "hr_from": None}, "mlflow": "nodes"}
    [found] = load_job_files(write(tmp_path / "job.yaml", shards), ["source=[s3://b/p, s3://b/q]"])
    assert found.options["source"] == ["s3://b/p", "s3://b/q"]
