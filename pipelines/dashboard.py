"""The dashboard of a Ray cluster: its Jobs API, and the nodes and waiting requests it reports.

Every request carries the token that Ray's own tools would find, whatever `RAY_AUTH_MODE` is, has a timeout, and fails
with an error of ours. The pages beside the Jobs API are not part of Ray's documented interface: look here when Ray's
pin changes.
"""

import os
import re
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from deedsr.errors import DeeDSRError, UsageError
from pipelines.cluster import require_docstrings

_CONNECT_SECONDS = 10.0  # also of the first answer
_ANSWER_SECONDS = 60.0
_UPLOAD_SECONDS = 600.0
# Loggers of Ray that have a line for each package, each .gitignore, each folder left out and each connection.
_CHATTY = (
    "dashboard.modules.dashboard_sdk",
    "dashboard.modules.job.sdk",
    "_private.runtime_env.packaging",
    "_private.runtime_env.working_dir",
)
_SUPERVISOR = "_ray_internal_job_actor_{}"  # the actor that runs a job's command, by submission id
_NAMESPACE = "SUPERVISOR_ACTOR_RAY_NAMESPACE"


class Unreachable(DeeDSRError):
    """The dashboard did not answer, or answered that the head is starting or ending."""


class JobGone(DeeDSRError):
    """The cluster does not know the job."""


class Dashboard:
    """The dashboard at `address`, http(s)://HOST:PORT.

    Raises UsageError for another kind of address, Unreachable where nobody answers there.
    """

    def __init__(self, address: str):
        if not address.startswith(("http://", "https://")):
            raise UsageError(f"--address takes the http(s) address of a Ray dashboard, got {address!r}")
        require_docstrings()
        self.address = address.rstrip("/")
        self._client = _client(self.address)

    def jobs(self) -> list[Any]:
        """Ray's `JobDetails` of every job."""
        return self._client.list_jobs()

    def job(self, job_id: str) -> Any:
        """Ray's `JobDetails`. Raises JobGone."""
        try:
            return self._client.get_job_info(job_id)
        except RuntimeError as error:
            raise _explained(self.address, job_id, error) from error

    def submit(self, **job: Any) -> None:
        """`JobSubmissionClient.submit_job`; a working directory is uploaded first unless the cluster has the same."""
        try:
            self._client.submit_job(**job)
        except (RuntimeError, ValueError) as error:
            raise DeeDSRError(f"the cluster at {self.address} refused the job: {_last_line(error)}") from error

    def log(self, job_id: str) -> AsyncIterator[str]:
        """The log from its beginning, and what is added to it until the job ends. Raises what aiohttp raises."""
        return self._client.tail_job_logs(job_id)

    def stop(self, job_id: str) -> None:
        """Has a running job end: SIGTERM, and SIGKILL after the job's `RAY_JOB_STOP_WAIT_TIME_S`. Returns at once."""
        try:
            self._client.stop_job(job_id)
        except RuntimeError as error:
            raise _explained(self.address, job_id, error) from error

    def drop(self, job_id: str, canceller: str) -> None:
        """Has a pending job end, which `stop` reaches only once it runs. `canceller`: id of the job on the head that
        removes its supervisor, because the dashboard's own interface cannot.
        """
        code = (
            "import ray; ray.init('auto', logging_level='ERROR'); "
            f"ray.kill(ray.get_actor({_SUPERVISOR.format(job_id)!r}, namespace={_NAMESPACE!r}))"
        )
        self.submit(entrypoint=f"python -c {shlex.quote(code)}", submission_id=canceller)

    def reserves(self, job_id: str) -> dict[str, float]:
        """What a pending job waits for, by resource; {} where it does not wait for resources."""
        name = _SUPERVISOR.format(job_id)
        answer = self._get(f"/api/v0/actors?detail=1&filter_keys=name&filter_predicates=%3D&filter_values={name}")
        actors = answer["data"]["result"]["result"]
        waiting = [actor["required_resources"] for actor in actors if actor["state"] == "PENDING_CREATION"]
        return {kind: amount for kind, amount in (waiting[0] if waiting else {}).items() if amount}

    def nodes(self) -> list[dict[str, float]]:
        """Resources of each living node."""
        nodes = self._get("/api/v0/nodes?detail=1")["data"]["result"]["result"]
        return [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]

    def free(self) -> dict[str, float]:
        """What the nodes have free together, by resource."""
        status = self._get("/api/cluster_status?format=1")["data"]["clusterStatus"] or ""
        usage = re.findall(r"^ ([\d.]+)/([\d.]+) (\w+)$", status, re.MULTILINE)
        return {kind: float(total) - float(used) for used, total, kind in usage}

    def grows(self) -> bool:
        """Whether the cluster may get more nodes, as far as one can know: only a head alone is known not to."""
        status = self._get("/api/cluster_status")["data"].get("clusterStatus") or {}
        types = (status.get("autoscalerReport") or {}).get("nodeTypeMapping")
        return not types or any(kind != f"node_{node}" for node, kind in types.items())

    def _get(self, path: str) -> Any:
        answer = self._client._do_request("GET", path)
        if answer.status_code != 200:
            raise DeeDSRError(f"the dashboard at {self.address} answers {path} with status {answer.status_code}")
        return answer.json()


def _client(address: str) -> Any:
    """Ray's client with token, timeouts and our errors. It does not log."""
    import logging

    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    headers, source = _authorization()

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **words: Any) -> Any:
            seconds = _ANSWER_SECONDS if method == "GET" else _UPLOAD_SECONDS
            if endpoint == "/api/version":  # the first question
                seconds = _CONNECT_SECONDS
            try:
                found = super()._do_request(method, endpoint, **{"timeout": (_CONNECT_SECONDS, seconds)} | words)
            except AuthenticationError as error:
                raise DeeDSRError(_refused(address, source)) from error
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                raise Unreachable(
                    f"no Ray dashboard answers at {address}; start the cluster or give --address"
                ) from error
            if method == "GET" and found.status_code >= 500:
                raise Unreachable(f"the Ray dashboard at {address} answers with status {found.status_code}")
            return found

    # Ray would take their address in place of the one that is given.
    theirs = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        return Client(address, headers=headers)
    finally:
        os.environ.update(theirs)


def token_file() -> Path:
    """Where the token for clusters is read, unless `RAY_AUTH_TOKEN` holds it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _authorization() -> tuple[dict[str, str], str]:
    """The header with the token that Ray would find, and where that lies; ({}, "") without one.

    Ray itself sends it only where `RAY_AUTH_MODE` is `token`; `disabled` in the environment is still obeyed.
    """
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}, "RAY_AUTH_MODE=disabled"
    loader = AuthenticationTokenLoader.instance()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    try:
        if not loader.has_token(ignore_auth_mode=True):
            return {}, ""
    except Exception as error:  # of Ray's C++ part: a RAY_AUTH_TOKEN_PATH that cannot be read
        raise DeeDSRError(
            f"cannot read the token in RAY_AUTH_TOKEN_PATH={Path(path)}: put the cluster's there"
        ) from error
    source = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else path or "~/.ray/auth_token"
    return {"Authorization": f"Bearer {loader.get_raw_token(ignore_auth_mode=True)}"}, source


def _refused(address: str, source: str) -> str:
    if source == "RAY_AUTH_MODE=disabled":
        return f"the cluster at {address} wants a token, and {source} says to send none: unset RAY_AUTH_MODE"
    if not source:
        return (
            f"the cluster at {address} wants a token and there is none: copy the cluster's to ~/.ray/auth_token, or "
            "set RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        )
    return f"the cluster at {address} refuses the token of {source}: put the cluster's there"


def _explained(address: str, job_id: str, error: RuntimeError) -> DeeDSRError:
    if "status code 404" in str(error):
        return JobGone(
            f"the cluster at {address} knows no job {job_id}; a head that was started anew has forgotten its jobs: "
            "submit the job again, which continues"
        )
    return DeeDSRError(f"the cluster at {address} refused: {_last_line(error)}")


def _last_line(error: BaseException) -> str:
    """Of what the server sent, which may be a traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
