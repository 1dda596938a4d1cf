"""The job file that `deedsr submit` sends to a Ray cluster.

    command: shards                     # any deedsr command
    options:                            # what its --config file would hold; checked before anything is sent
      source: [s3://photos/raw]
      out: s3://photos/shards
    name: shards                        # the submission id begins with it
    working_dir: ..                     # uploaded and made the working directory; relative to this file;
                                        # null: nothing is uploaded, the cluster's image has deedsr installed
    excludes: [big_folder/]             # left out of the upload, besides .gitignore and EXCLUDES below
    runtime_env:
      env_vars: {MLFLOW_TRACKING_URI: "http://mlflow:5000"}
      pip: []                           # packages that the cluster's image lacks
    entrypoint_num_cpus: 0              # reserved for the command itself, which then runs on a worker node; with 0 on
    entrypoint_num_gpus: 0              # the head; tasks, actors and training workers ask for their own
    entrypoint_memory: 0                # bytes

Secrets have no place in it: AWS credentials come from the cluster's environment or instance role.
"""

import re
import shlex
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deedsr.errors import UsageError
from jobs.options import mapping_of, spelled, words_of
from pipelines.tracking.provenance import git_commit

EXCLUDES = [".git/", ".venv/", "**/__pycache__/", "/tests/", "/benchmarks/", "/demo/", "/out/", "/mlruns/", "*.db"]
SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|ACCESS_KEY|API_KEY", re.IGNORECASE)
SECRET_VALUE = re.compile(r"://[^/@\s]+:[^/@\s]+@")  # user and password inside a URL


class RuntimeEnvironment(BaseModel):
    """The part of Ray's runtime environment that a job needs."""

    model_config = ConfigDict(extra="forbid")

    env_vars: dict[str, str] = {}
    pip: list[str] = []

    @field_validator("env_vars")
    @classmethod
    def _no_secret(cls, env_vars: dict[str, str]) -> dict[str, str]:
        for name, value in env_vars.items():
            if SECRET_NAME.search(name) or SECRET_VALUE.search(value):
                raise ValueError(
                    f"{name} looks like a secret, and a job file is stored and shown by the cluster; "
                    "set it in the environment of the cluster's nodes or use an instance role"
                )
        return env_vars


class JobFile(BaseModel):
    """One job; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    command: str
    options: dict[str, Any] = {}
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")] = "deedsr"
    working_dir: str | None = None
    excludes: list[str] = []
    runtime_env: RuntimeEnvironment = RuntimeEnvironment()
    entrypoint_num_cpus: Annotated[float, Field(ge=0)] = 0
    entrypoint_num_gpus: Annotated[float, Field(ge=0)] = 0
    entrypoint_memory: Annotated[int, Field(ge=0)] = 0

    @property
    def arguments(self) -> list[str]:
        """The options as one would type them."""
        return [spelled(f"--{key}={word}") for key, words in words_of(self.options).items() for word in words]

    @property
    def entrypoint(self) -> str:
        """The shell command that the cluster runs; `ray job submit` takes the same one."""
        return shlex.join(["python", "-m", "deedsr", *self.command.split(), *self.arguments])

    def ray_runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment, without what is empty."""
        environment: dict[str, Any] = self.runtime_env.model_dump(exclude_defaults=True)
        if self.working_dir is not None:
            environment |= {"working_dir": self.working_dir, "excludes": EXCLUDES + self.excludes}
            if commit := git_commit():  # the upload leaves .git behind
                environment["env_vars"] = {"DEEDSR_GIT_COMMIT": commit} | self.runtime_env.env_vars
        return environment


def load_job_file(path: Path) -> JobFile:
    """Read and check a job file, its command's options included; UsageError names the key and the remedy."""
    from jobs.cli import COMMANDS, load

    try:
        job = JobFile.model_validate(mapping_of(path))
    except ValidationError as error:
        raise UsageError("\n".join(f"{path}: {_said(problem)}" for problem in error.errors())) from None
    # Pages and demos are written to the disk of whoever runs the command, here a node of the cluster.
    commands = [name for name in COMMANDS if name not in ("submit", "demo", "inspect")]
    if job.command not in commands:
        raise UsageError(f"{path}: command must be one of {', '.join(commands)}; got {job.command!r}")
    _, parser = load(job.command)
    try:
        parser.read(job.arguments)
    except UsageError as error:
        raise UsageError(f"{path}: options: {error}") from None
    out = str(job.options["out"]) if "out" in job.options else "s3://"
    if "://" not in out and not PurePosixPath(out).is_absolute():
        raise UsageError(
            f"{path}: options.out is {out!r}, relative to a working directory that vanishes with the job; "
            "give an s3:// URI or an absolute path on storage that all nodes share"
        )
    if job.working_dir is not None:
        folder = (path.parent / job.working_dir).resolve()
        if not folder.is_dir():
            raise UsageError(f"{path}: working_dir {folder} is not a folder")
        job = job.model_copy(update={"working_dir": str(folder)})
    return job


def _said(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "extra_forbidden":
        known = RuntimeEnvironment.model_fields if key.startswith("runtime_env.") else JobFile.model_fields
        close = get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0.5)
        return f"unknown key {key}" + (f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}")
    message = problem["msg"].removeprefix("Value error, ")
    return (
        f"{key}: {message}" if problem["type"] == "value_error" else f"{key}: {message}, got {problem['input']!r:.80}"
    )
