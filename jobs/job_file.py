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

Secrets have no place in it: AWS credentials come from the cluster's environment or instance role. A site's names
replace YOUR-...: they come from `site.yaml` beside the job file, which git ignores (`jobs/site.example.yaml` is one to
copy), or from the environment: YOUR-BUCKET from YOUR_BUCKET, which wins.
"""

import copy
import itertools
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deedsr.errors import UsageError, explained
from jobs.options import mapping_of, spelled, word_of
from jobs.upload import EXCLUDES
from pipelines.tracking.provenance import git_commit
from pipelines.tracking.stale import USER_VARIABLE, user
from pipelines.tracking.store import sqlite_path, tracking_uri

STORE = "MLFLOW_TRACKING_URI"
WITH_STORE = ("chain", "shards", "latents", "train learner", "train adapter", "evaluate", "compare", "runs close-stale")
# Between SIGTERM and SIGKILL of a job that is stopped, in which a training checkpoints. Ray's default is 3.
STOP_SECONDS = {"RAY_JOB_STOP_WAIT_TIME_S": "120"}


SITE = "site.yaml"
PLACEHOLDER = re.compile(r"YOUR(?:-[A-Z0-9]+)+")


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
                raise ValueError(f"names {requirement!r}, a path of this machine, which the cluster cannot read")
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
        raise UsageError("\n".join(f"{path}: {explained(problem, JobFile)}" for problem in error.errors())) from None
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
    no_run = getattr(options, "plan", False) or not getattr(options, "tracking", True)
    if job.command in WITH_STORE and job.mlflow is None and not no_run:
        raise UsageError(
            f"{path}: "
            + (f"{STORE}={store} lies in" if store else f"runtime_env.env_vars has no {STORE}, so the run would lie in")
            + " a working directory that vanishes with the job; name the MLflow server there, or say `mlflow: nodes` "
            "where the nodes' environment names it, or `mlflow: none` where the run may be lost"
        )


# Values that look like credentials: the cluster stores and shows jobs, so they must not be sent

# Words of a name, as in AWS_SECRET_ACCESS_KEY; names of files and folders that hold a credential are none.
_SECRET_WORD = re.compile("secret|token|pass(wd|word|phrase)?|credentials?|(api)?key")
_PLACE_WORDS = {"path", "file", "dir", "name"}
_VALUES = re.compile(
    "|".join(
        [
            r"://[^/@\s:]*:[^/@\s]+@",  # password of a URL
            r"://[^/@\s:]{16,}@",  # token as user of a URL
            r"[?&](?:[\w-]*[-_])?(?:token|key|signature|password|secret|sig)=",  # signed URL
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS
            r"\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}",  # GitHub, GitLab
            r"\bhf_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}|\bxox[abprs]-[\w-]{10,}|\bdapi[0-9a-f]{32}\b",
            r"\bpypi-[\w-]{30,}|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.",  # PyPI, Google, JSON web token
            r"-----BEGIN [A-Z ]*PRIVATE KEY",
        ]
    ),
    re.IGNORECASE,
)


def suspicious(tree: Any, key: str = "", name: str = "") -> Iterator[str]:
    """Dotted keys of `tree` whose name or value looks like a credential."""
    if isinstance(tree, dict):
        for word, value in tree.items():
            yield from suspicious(value, f"{key}.{word}" if key else str(word), str(word))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from suspicious(value, f"{key}[{number}]", name)
    elif _VALUES.search(f"{name} {tree}") or (_is_secret_name(name) and tree not in (None, "")):
        yield key


def _is_secret_name(name: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    return bool(words) and words[-1] not in _PLACE_WORDS and any(map(_SECRET_WORD.fullmatch, words))


# Values that job files leave open: a site's own names, and options that `--set` overrides


def filled(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """A job file's content with the site's names in it. Raises UsageError where one is missing."""
    names = _names(path.parent / SITE)
    missing: dict[str, list[str]] = {}

    def fill(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: fill(item, f"{key}.{name}".lstrip(".")) for name, item in value.items()}
        if isinstance(value, list):
            return [fill(item, key) for item in value]
        if not isinstance(value, str):
            return value
        for name in PLACEHOLDER.findall(value):
            if name not in names:
                missing.setdefault(name, []).append(key)
        return PLACEHOLDER.sub(lambda found: names.get(found[0], found[0]), value)

    content = fill(tree, "")
    if missing:
        where = "; ".join(f"{name} in {', '.join(dict.fromkeys(keys))}" for name, keys in missing.items())
        name = next(iter(missing))
        raise UsageError(
            f"{path}: {where}: give your own names in {path.parent / SITE} (a line such as `{name}: ...`; "
            f"site.example.yaml is one to copy) or in variables such as {name.replace('-', '_')}"
        )
    return content


def _names(path: Path) -> dict[str, str]:
    names = mapping_of(path) if path.exists() else {}
    for name, value in names.items():
        if not PLACEHOLDER.fullmatch(str(name)) or not isinstance(value, str | int):
            raise UsageError(f"{path}: lines are such as `YOUR-BUCKET: photos`, got `{name}: {value}`")
    variables = {key.replace("_", "-"): value for key, value in os.environ.items() if key.startswith("YOUR_") and value}
    return {name: str(value) for name, value in names.items()} | variables


def overridden(tree: dict[str, Any], settings: list[str], path: Path) -> Iterator[dict[str, Any]]:
    """A job for each combination of the values in `settings`, such as `train.lr=1e-5,3e-5`.

    Where there are several, `name` and `options.out` of each end in what it has of them: learner-lr-1e-5.
    """
    choices = [_choices(setting) for setting in settings]
    for values in itertools.product(*(values for _, values in choices)):
        job = copy.deepcopy(tree)
        options = job.setdefault("options", {})
        if not isinstance(options, dict):
            raise UsageError(f"{path}: options must be a mapping, got {options!r:.60}")
        labels = []
        for (key, several), value in zip(choices, values, strict=True):
            _put(options, key.split("."), value)
            if len(several) > 1:
                labels.append(_label(key, value))
        if labels:
            job["name"] = "-".join([str(job.get("name", "deedsr")), *labels])
            if "out" in options and "out" not in [key for key, several in choices if len(several) > 1]:
                options["out"] = "-".join([str(options["out"]).rstrip("/"), *labels])
        yield job


def _choices(setting: str) -> tuple[str, list[Any]]:
    """The key, and the values as YAML reads them between brackets; one with a comma in it is quoted."""
    key, equals, text = setting.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z][\w.-]*", key):
        raise UsageError(f"--set takes KEY=VALUE of the job's options, such as train.lr=3e-5, got {setting!r}")
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise UsageError(f"--set {setting}: put the value in quotes that YAML knows, such as {key}='\"...\"'") from None
    if not values:
        raise UsageError(f"--set {key}= needs a value; null stands for none")
    return key.removeprefix("options.").replace("-", "_"), values


def _put(options: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(options.get(key), dict):
            options[key] = {}
        options = options[key]
    options[keys[-1]] = value


def _label(key: str, value: Any) -> str:
    said = word_of(value).rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9]+", "-", f"{key.rpartition('.')[2]}-{said}").strip("-")
