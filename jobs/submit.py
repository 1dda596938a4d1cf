"""Send a job file to a Ray cluster through its Jobs API.

The file's options are checked here, before anything is sent. A job that is already running there is not started a
second time: it is followed. Submitting again after it failed or was stopped continues where it got to, because every
command continues with the same --out. Ctrl-C ends the following, never the job.
"""

import asyncio
import dataclasses
import logging
import os
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deedsr.errors import DeeDSRError
from jobs.command import Command, Outcome
from jobs.job_file import JobFile, load_job_file
from pipelines.cluster import dashboard

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


@dataclasses.dataclass
class SubmitOptions:
    job: str  # job file, such as jobs/shards.yaml
    address: str | None = None  # the cluster's dashboard; null = RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265
    wait: bool = False  # follow the logs until the job has ended


def run(options: SubmitOptions) -> Outcome:
    job = load_job_file(Path(options.job))
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    client = dashboard(address)
    try:
        job_id = running(client, job) or submit(client, job)
        details = report(client, job, job_id, address, options.wait)
    except (RuntimeError, ConnectionError) as error:
        raise DeeDSRError(f"the cluster at {address} refused or went away: {error}") from error
    values = {"job_id": job_id, "status": str(details.status), "entrypoint": job.entrypoint, "address": address}
    if details.status in ("FAILED", "STOPPED"):
        return Outcome(values | {"message": details.message}, complete=False)
    return Outcome(values)


def report(client: "JobSubmissionClient", job: JobFile, job_id: str, address: str, wait: bool) -> "JobDetails":
    """What has become of the job, after its end if `wait`. Ctrl-C says how to reach the job, which goes on."""
    try:
        logger.info("%s runs: %s", job_id, job.entrypoint)
        if wait:
            follow(client, job_id)
        return client.get_job_info(job_id)
    except KeyboardInterrupt:
        how = " or ".join(f"ray job {verb} {job_id} --address {address}" for verb in ("stop", "logs --follow"))
        print(f"{job_id} keeps running; stop or follow it with: {how}", file=sys.stderr)
        raise


def running(client: "JobSubmissionClient", job: JobFile) -> str | None:
    """Submission id of a job with the same entry point that has not ended, if there is one."""
    for details in client.list_jobs():
        if details.entrypoint == job.entrypoint and details.submission_id and not details.status.is_terminal():
            logger.info("this job was submitted before and has not ended")
            return details.submission_id
    return None


def submit(client: "JobSubmissionClient", job: JobFile) -> str:
    """Upload the working directory, start the job, return its submission id."""
    job_id = client.submit_job(
        entrypoint=job.entrypoint,
        submission_id=f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}",
        runtime_env=job.ray_runtime_env(),
        entrypoint_num_cpus=job.entrypoint_num_cpus,
        entrypoint_num_gpus=job.entrypoint_num_gpus,
        entrypoint_memory=job.entrypoint_memory or None,
    )
    return job_id


def follow(client: "JobSubmissionClient", job_id: str) -> None:
    """Copy the job's log to stderr until the job has ended; a broken connection is taken up again."""
    shown = 0

    async def tail() -> None:
        nonlocal shown
        seen = 0
        async for text in client.tail_job_logs(job_id):
            # A new connection tells the log from its beginning.
            sys.stderr.write(text[max(0, shown - seen) :])
            sys.stderr.flush()
            seen += len(text)
            shown = max(shown, seen)

    while not client.get_job_status(job_id).is_terminal():
        try:
            asyncio.run(tail())
        except RuntimeError as error:
            logger.warning("lost the log of %s (%s); connecting again", job_id, error)
        time.sleep(POLL_SECONDS)


COMMAND = Command(
    SubmitOptions, run, operand="job", example="deedsr submit jobs/shards.yaml --address http://127.0.0.1:8265 --wait"
)
