"""The job file that `deedsr submit` sends to a Ray cluster.

    command: shards                     # any deedsr command
    options:                            # what its --config file would hold; checked before anything is sent
      source: [s3://photos/raw]
      out: s3://photos/shards
    name: shards                        # the submission id begins with it
    working_dir: ..                     # uploaded and made the working directory; relative to this file;
                                        # null: nothing is uploaded, the cluster's image has deedsr installed
    excludes: [big_folder/]             # left out of the upload, besides .gitignore and EXCLUDES of jobs/upload.py
    runtime_env:
      env_vars: {MLFLOW_TRACKING_URI: "http://mlflow:5000"}
      pip: []                           # packages that the cluster's image lacks
    mlflow: null                        # nodes: their environment has MLFLOW_TRACKING_URI; none: the run may be lost
    entrypoint_num_cpus: 0              # reserved for the command itself, which then runs on a worker node; with 0 on
    entrypoint_num_gpus: 0              # the head; tasks, actors and training workers ask for their own
    entrypoint_memory: 0                # bytes

Secrets have no place in it: AWS credentials come from the cluster's environment or instance role.
"""

import re
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deedsr.errors import UsageError
from jobs.credentials import suspicious
from jobs.options import mapping_of, spelled
from jobs.site import filled, overridden
from jobs.upload import EXCLUDES
from pipelines.tracking.provenance import git_commit
from pipelines.tracking.stale import USER_VARIABLE, user
from pipelines.tracking.store import sqlite_path, tracking_uri

STORE = "MLFLOW_TRACKING_URI"
WITH_STORE = ("chain", "shards", "latents", "train learner", "train adapter", "evaluate", "compare", "runs close-stale")
# Between SIGTERM and SIGKILL of a job that is stopped, in which a training checkpoints. Ray's default is 3.
STOP_SECONDS = {"RAY_JOB_STOP_WAIT_TIME_S": "120"}


class RuntimeEnvironment(BaseModel):
    """The part of Ray's runtime environment that a job needs."""

    model_config = ConfigDict(extra="forbid")

    env_vars: dict[str, str] = {}
    pip: list[str] = []

    @field_validator("pip")
    @classmethod
    def _no_path(cls, pip: list[str]) -> list[str]:
        for requirement in pip:
            if re.match(r"[./~]|file:|-r", requirement):
                raise ValueError(f"{requirement!r} is a path of this machine, which the cluster cannot read")
        return pip


class JobFile(BaseModel):
    """One job; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    command: str
    options: dict[str, Any] = {}
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,99}$")] = "deedsr"
    working_dir: str | None = None
    excludes: list[str] = []
    runtime_env: RuntimeEnvironment = RuntimeEnvironment()
    mlflow: Literal["nodes", "none"] | None = None
    entrypoint_num_cpus: Annotated[float, Field(ge=0)] = 0
    entrypoint_num_gpus: Annotated[float, Field(ge=0)] = 0
    entrypoint_memory: Annotated[int, Field(ge=0)] = 0

    @property
    def arguments(self) -> list[str]:
        """The options as one would type them."""
        from jobs.cli import load

        words = load(self.command)[1].words_of(self.options)
        return [spelled(f"--{key}={word}") for key, several in words.items() for word in several]

    @property
    def entrypoint(self) -> str:
        """The shell command that the cluster runs; `ray job submit` takes the same one."""
        return shlex.join(["python", "-m", "deedsr", *self.command.split(), *self.arguments])

    def ray_runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment, without what is empty."""
        environment: dict[str, Any] = self.runtime_env.model_dump(exclude_defaults=True)
        variables = STOP_SECONDS | {USER_VARIABLE: user()}
        if self.working_dir is not None:
            environment |= {"working_dir": self.working_dir, "excludes": EXCLUDES + self.excludes}
            if commit := git_commit(Path(self.working_dir)):  # the upload leaves .git behind
                variables["DEEDSR_GIT_COMMIT"] = commit
        return environment | {"env_vars": variables | self.runtime_env.env_vars}


def load_job_files(path: Path, settings: Sequence[str] = ()) -> list[JobFile]:
    """The jobs of a job file, one for each combination of the values of `settings` (`--set`).

    Raises UsageError, naming the key and the remedy, for whatever the command or the cluster would refuse.
    """
    jobs = [_load(path, tree) for tree in overridden(mapping_of(path), list(settings), path)]
    for key, values in (("name", [job.name for job in jobs]), ("out", [job.options.get("out") for job in jobs])):
        if twice := [value for value in values if value is not None and values.count(value) > 1]:
            raise UsageError(f"--set makes several jobs with {key} {twice[0]}: give values whose names differ")
    return jobs


def load_job_file(path: Path) -> JobFile:
    """The one job of a job file; see `load_job_files`."""
    [job] = load_job_files(path)
    return job


def _load(path: Path, tree: dict[str, Any]) -> JobFile:
    from jobs.cli import COMMANDS, load

    # First, because the other errors show values.
    for key in suspicious(tree):
        raise UsageError(
            f"{path}: {key} looks like a credential, and jobs are stored and shown by the cluster; set it in the "
            "environment of the cluster's nodes or use an instance role"
        )
    try:
        job = JobFile.model_validate(filled(tree, path))
    except ValidationError as error:
        raise UsageError("\n".join(f"{path}: {_said(problem)}" for problem in error.errors())) from None
    for key in suspicious(job.model_dump()):
        raise UsageError(f"{path}: {key} gets what looks like a credential from the site's names")
    # Pages and demos are written to the disk of whoever runs the command, here a node of the cluster.
    commands = [name for name in COMMANDS if name not in ("submit", "demo", "inspect", "runs list", "runs show")]
    if job.command not in commands:
        raise UsageError(f"{path}: command must be one of {', '.join(commands)}; got {job.command!r}")
    command, parser = load(job.command)
    try:
        options = parser.read(job.arguments).options
        command.check(options)
    except UsageError as error:
        raise UsageError(f"{path}: options: {error}") from None
    _check_store(path, job, options)
    for key, [*_, out] in parser.words_of(job.options).items():
        if key.rpartition(".")[2] == "out" and "://" not in out and not PurePosixPath(out).is_absolute():
            raise UsageError(
                f"{path}: options.{key} is {out!r}, relative to a working directory that vanishes with the job; "
                "give an s3:// URI or an absolute path on storage that all nodes share"
            )
    if job.working_dir is not None:
        folder = (path.parent / job.working_dir).resolve()
        if not folder.is_dir():
            raise UsageError(f"{path}: working_dir {folder} is not a folder")
        job = job.model_copy(update={"working_dir": str(folder)})
    return job


def _check_store(path: Path, job: JobFile, options: Any) -> None:
    """UsageError if the MLflow run would be lost with the working directory, unless the job file accepts that."""
    store = job.runtime_env.env_vars.get(STORE)
    if store is not None:
        try:
            file = sqlite_path(tracking_uri(store))
        except UsageError as error:
            raise UsageError(f"{path}: runtime_env.env_vars: {error}") from None
        if file is None or ":////" in store:
            return
    no_run = any(getattr(options, name, False) for name in ("plan",)) or getattr(options, "tracking", True) is False
    if job.command in WITH_STORE and job.mlflow is None and not no_run:
        raise UsageError(
            f"{path}: "
            + (f"{STORE}={store} lies in" if store else f"runtime_env.env_vars has no {STORE}, so the run would lie in")
            + " a working directory that vanishes with the job; name the MLflow server there, or say `mlflow: nodes` "
            "where the nodes' environment names it, or `mlflow: none` where the run may be lost"
        )


def _said(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "extra_forbidden":
        known = RuntimeEnvironment.model_fields if key.startswith("runtime_env.") else JobFile.model_fields
        close = get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0.5)
        return f"unknown key {key}" + (f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}")
    if problem["type"] == "value_error":  # of this file, which names the value
        return f"{key}: {problem['ctx']['error']}"
    return f"{key}: {problem['msg']}, got {problem['input']!r:.80}"
