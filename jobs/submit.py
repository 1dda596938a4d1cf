"""Send a job file to a Ray cluster through its Jobs API, follow a job or stop one.

The job file is checked here, before anything is sent. If an equal job (command, options, code, environment) has not
ended, no second one is submitted; that job is followed. A job that failed or was stopped continues when it is submitted
again, because every command continues with the same --out. Ctrl-C stops following the job, not the job.
"""

import dataclasses
import hashlib
import json
import logging
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from deedsr.errors import UsageError
from jobs.command import Command, Outcome
from jobs.following import follow, how_to, stop
from jobs.job_file import JobFile, load_job_files
from jobs.upload import package
from pipelines.dashboard import Dashboard

logger = logging.getLogger(__name__)

# Of the job in Ray's metadata.
IDENTITY, OUT = "deedsr.job", "deedsr.out"


@dataclasses.dataclass
class SubmitOptions:
    job: Annotated[str | None, "job file, such as jobs/shards.yaml"] = None
    set: Annotated[list[str], "overrides such as train.lr=3e-5; several values make several jobs"] = dataclasses.field(
        default_factory=list
    )
    follow: Annotated[str | None, "id of a job to follow until it ends"] = None
    stop: Annotated[str | None, "id of a running or queued job to stop"] = None
    address: Annotated[str | None, "dashboard URL; null = RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265"] = None
    wait: Annotated[bool, "follow the logs until the job ends"] = False


def run(options: SubmitOptions) -> Outcome:
    import ray  # noqa: F401  a missing one is reported before a job file that is not filled in

    given = [name for name in ("job", "follow", "stop") if getattr(options, name)]
    if len(given) != 1:
        raise UsageError("give one of JOB (a job file such as jobs/shards.yaml), --follow ID and --stop ID")
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    jobs = load_job_files(Path(options.job), options.set) if options.job else []
    board = Dashboard(address)
    if options.stop:
        return Outcome({"job_id": options.stop, "status": stop(board, options.stop), "address": board.address})
    if options.follow:
        return _ended(board, options.follow)
    ids = _submitted(board, jobs)
    ends = [_ended(board, job_id) if options.wait else _started(board, job_id) for job_id in ids]
    if len(ends) == 1:
        return ends[0]
    return Outcome({"jobs": [dict(end.values) for end in ends]}, complete=all(end.complete for end in ends))


def _submitted(board: Dashboard, jobs: list[JobFile]) -> list[str]:
    """Submission ids of jobs that are equal to these and have not ended, or that are submitted now."""
    identities = [_identity(job) for job in jobs]
    for job in jobs:
        _require_room(board, job)
    there = [details for details in board.jobs() if details.submission_id and not details.status.is_terminal()]
    known = {(details.metadata or {}).get(IDENTITY): details.submission_id for details in there}
    for job, identity in zip(jobs, identities, strict=True):
        rival = next((d for d in there if (d.metadata or {}).get(OUT) == _out(job) != ""), None)
        if rival is not None and identity not in known:
            raise UsageError(
                f"{rival.submission_id} has not ended and has the same out, {_out(job)}, with other options, code or "
                f"environment; end it first: {how_to(rival.submission_id, board.address)['stop']}"
            )
    for job_id in [known[identity] for identity in identities if identity in known]:
        logger.info("%s is the same job and has not ended", job_id)
    return [
        known.get(identity) or _submit(board, job, identity) for job, identity in zip(jobs, identities, strict=True)
    ]


def _submit(board: Dashboard, job: JobFile, identity: str) -> str:
    job_id = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    board.submit(
        entrypoint=job.entrypoint,
        submission_id=job_id,
        runtime_env=job.ray_runtime_env(),
        metadata={IDENTITY: identity, OUT: _out(job)},
        entrypoint_num_cpus=job.entrypoint_num_cpus,
        entrypoint_num_gpus=job.entrypoint_num_gpus,
        entrypoint_memory=job.entrypoint_memory or None,
    )
    logger.info("submitted %s: %s", job_id, job.entrypoint)
    return job_id


def _identity(job: JobFile) -> str:
    """Digest of all that a job does: command, options, the code that is uploaded, environment, reservations.

    Raises UsageError for what Ray would refuse.
    """
    from ray.runtime_env import RuntimeEnv

    code = package(Path(job.working_dir), job.ray_runtime_env()["excludes"], job.options) if job.working_dir else None
    try:
        RuntimeEnv(**job.runtime_env.model_dump(exclude_defaults=True))
    except (TypeError, ValueError) as error:
        raise UsageError(f"runtime_env: Ray refuses it: {' '.join(str(error).split())}") from error
    same: list[Any] = [job.entrypoint, code, job.runtime_env.model_dump()]
    same += [job.entrypoint_num_cpus, job.entrypoint_num_gpus, job.entrypoint_memory]
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def _out(job: JobFile) -> str:
    return str(job.options.get("out") or "").rstrip("/")


def _require_room(board: Dashboard, job: JobFile) -> None:
    """Raises UsageError if no node can hold the command's reservation and the cluster cannot grow."""
    wanted = {"CPU": job.entrypoint_num_cpus, "GPU": job.entrypoint_num_gpus, "memory": job.entrypoint_memory}
    wanted = {kind: amount for kind, amount in wanted.items() if amount}
    fits = [node for node in board.nodes() if all(node.get(kind, 0) >= amount for kind, amount in wanted.items())]
    if wanted and not fits and not board.grows():
        words = ", ".join(f"{kind} {amount:g}" for kind, amount in wanted.items())
        raise UsageError(
            f"no node of the cluster at {board.address} has {{{words}}} for the command, and no autoscaler adds one: "
            "lower entrypoint_num_cpus, entrypoint_num_gpus and entrypoint_memory (0: the command runs on the head)"
        )


def _started(board: Dashboard, job_id: str) -> Outcome:
    """Result for a job that is not followed."""
    status = {"job_id": job_id, "status": str(board.job(job_id).status), "address": board.address}
    return Outcome(status | how_to(job_id, board.address))


def _ended(board: Dashboard, job_id: str) -> Outcome:
    """Result of a job after following it. On Ctrl-C, prints how to follow or stop the job, which continues."""
    try:
        details = follow(board, job_id)
    except KeyboardInterrupt:
        how = " or ".join(how_to(job_id, board.address).values())
        print(f"{job_id} goes on; follow or stop it with: {how}", file=sys.stderr)
        raise
    values = {"job_id": job_id, "status": str(details.status), "address": board.address}
    if details.status == "FAILED" and details.driver_exit_code is None:  # else the log that was followed says why
        values["message"] = str(details.message).strip()
    return Outcome(values, complete=details.status == "SUCCEEDED")


COMMAND = Command(
    SubmitOptions, run, operand="job", example="deedsr submit jobs/shards.yaml --address http://127.0.0.1:8265 --wait"
)
