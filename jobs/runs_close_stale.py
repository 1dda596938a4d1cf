"""End stale runs in MLflow: set them to KILLED, with the time of their last heartbeat as end.

In the store of MLFLOW_TRACKING_URI. A killed process leaves its run RUNNING; the next command with the same --out ends
it, too. Runs with a heartbeat in the last ten minutes and runs of other users are not changed.
"""

import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated

from deedsr.errors import UsageError
from jobs.command import Command, Outcome

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@dataclass
class CloseStaleOptions:
    older: Annotated[str, "minimum time since the last heartbeat: 30m, 1h, 2d"] = "10m"
    everyone: Annotated[bool, "also runs of other users"] = False


def run(options: CloseStaleOptions) -> Outcome:
    from pipelines import tracking

    match = re.fullmatch(r"(\d+)([smhd])", options.older)
    if not match:
        raise UsageError(f"--older takes a time such as 30m, 1h or 2d, got {options.older!r}")
    client = tracking.connect(tracking.tracking_uri())
    done = tracking.close_stale(client, older=timedelta(**{UNITS[match[2]]: int(match[1])}), everyone=options.everyone)
    return Outcome({"closed": done.closed, "left": [f"{run_id}: {reason}" for run_id, reason in done.left.items()]})


COMMAND = Command(CloseStaleOptions, run, example="deedsr runs close-stale --older 1h")
