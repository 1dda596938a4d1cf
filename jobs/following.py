"""Follows or stops a job of a Ray cluster; reconnects after lost connections."""

import asyncio
import logging
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from deedsr.errors import DeeDSRError
from pipelines.dashboard import Dashboard, Unreachable

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
LINE_SECONDS = 30.0  # between log lines about waiting; also silence in the log before the job's status is queried
AWAY_SECONDS = 600.0  # without connection before following is given up
LOG_TRIES = 3  # for the last lines of a job that has ended
# What Ray writes into a job's log before its command does.
_OF_RAY = re.compile(r"^(?:.*job_manager\.py:\d+ -- Runtime env is setting up\.|Running entrypoint for job .*)\n", re.M)


class GoesOn(DeeDSRError):
    """The job is not followed any more and goes on."""

    exit_code = 3


def how_to(job_id: str, address: str) -> dict[str, str]:
    """The commands that follow and stop a job."""
    return {verb: f"deedsr submit --{verb} {job_id} --address {address}" for verb in ("follow", "stop")}


def follow(board: Dashboard, job_id: str) -> Any:
    """Copies the job's log to stderr until the job has ended; returns Ray's `JobDetails`.

    Raises GoesOn after ten minutes without connection, JobGone where the cluster has forgotten the job.
    """
    import aiohttp

    log, watch, status, failures = _Log(), _Watch(board, job_id), None, 0
    with asyncio.Runner() as loop:
        # Made at once: Ctrl-C in the middle of that would leave half of one. What it interrupts later is no news.
        loop.get_loop().set_exception_handler(lambda *_: None)
        while True:
            try:
                details = board.job(job_id)
                watch.regain()
                if details.status != status and not details.status.is_terminal():
                    logger.info("%s %s", job_id, "is pending" if details.status == "PENDING" else "runs")
                status = details.status
                if status == "PENDING":
                    watch.log(f"{job_id} is pending, waiting", partial(_awaited, board, job_id))
                else:
                    loop.run(log.copy(board.log(job_id)))
                if status.is_terminal():
                    return details
            except (Unreachable, RuntimeError, OSError, aiohttp.ClientError) as error:
                failures += 1
                if status is not None and status.is_terminal() and failures >= LOG_TRIES:
                    logger.warning("the rest of the log of %s cannot be read: %s", job_id, error)
                    return details
                watch.lose(error)
            time.sleep(POLL_SECONDS)


def stop(board: Dashboard, job_id: str) -> str:
    """Stops the job, running or pending, waits for its end and returns its status."""
    watch, asked, remover = _Watch(board, job_id), None, ""
    while True:
        try:
            details = board.job(job_id)
            watch.regain()
            if details.status.is_terminal():
                return "STOPPED" if asked == "PENDING" else str(details.status)
            if details.status != asked:
                asked = details.status
                if asked == "PENDING":
                    remover = f"{job_id}-end-{secrets.token_hex(2)}"
                    board.drop(job_id, remover)
                else:
                    board.stop(job_id)
            if asked == "PENDING" and board.job(remover).status == "FAILED":
                raise DeeDSRError(
                    f"{job_id} is pending and could not be ended: {how_to(remover, board.address)['follow']}"
                )
            reason = "a job on the head removes it" if asked == "PENDING" else "a training checkpoints first"
            watch.log("waiting", partial(str, f"the end of {job_id}: {reason}"))
        except Unreachable as error:
            watch.lose(error)
        time.sleep(POLL_SECONDS)


class _Watch:
    """Whether the dashboard answers, and since when not; a log line every half minute."""

    def __init__(self, board: Dashboard, job_id: str):
        self._board, self._job_id = board, job_id
        self._lost: float | None = None
        self._began = self._logged = time.monotonic()

    def regain(self) -> None:
        if self._lost is not None:
            logger.info("connected again to %s", self._board.address)
        self._lost = None

    def lose(self, error: Exception) -> None:
        if self._lost is None:
            self._lost = time.monotonic()
            logger.warning("lost the connection to %s (%s); trying again for %.0f s, %s goes on",
                           self._board.address, error, AWAY_SECONDS, self._job_id)  # fmt: skip
        if time.monotonic() - self._lost >= AWAY_SECONDS:
            again = how_to(self._job_id, self._board.address)["follow"]
            raise GoesOn(
                f"no connection to {self._board.address} for {AWAY_SECONDS:.0f} s; as far as one can know from here "
                f"the job goes on; to follow it again: {again}"
            ) from error

    def log(self, waiting: str, reason: Callable[[], str]) -> None:
        """Logs `waiting` with its duration and reason, at most every LINE_SECONDS."""
        now = time.monotonic()
        if now - self._logged >= LINE_SECONDS:
            self._logged = now
            logger.info("%s %.0f s for %s", waiting, now - self._began, reason())


def _awaited(board: Dashboard, job_id: str) -> str:
    """Reason why the job is pending."""
    try:
        wanted = board.reserves(job_id)
        if not wanted:
            return "its environment (upload, packages)"
        words = ", ".join(f"{kind} {amount:g}" for kind, amount in wanted.items())
        free = board.free()
        there = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in wanted)
        fits = any(all(node.get(kind, 0) >= amount for kind, amount in wanted.items()) for node in board.nodes())
    except Unreachable:
        raise
    except DeeDSRError as error:
        return f"what the cluster does not say: {error}"
    return f"{{{words}}}: free: {there}" + ("" if fits else "; no node there has as much")


class _Log:
    """Prints a job's log once, although each new connection sends it from the beginning."""

    def __init__(self) -> None:
        self._shown = 0

    async def copy(self, stream: AsyncIterator[str]) -> None:
        """Until the stream ends or is silent for half a minute."""
        seen = 0
        while True:
            try:
                text = await asyncio.wait_for(anext(stream), LINE_SECONDS)
            except (StopAsyncIteration, TimeoutError):
                return
            sys.stderr.write(_OF_RAY.sub("", text[max(0, self._shown - seen) :]))
            sys.stderr.flush()
            seen += len(text)
            self._shown = max(self._shown, seen)
