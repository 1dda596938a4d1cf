"""Check everything that commands depend on: versions, devices, limits, plans, storage, MLflow, cluster.

Each line has `ok` or the remedy. Put the output into a bug report; it holds no passwords, tokens or keys. Exit code 1
if a check fails.
"""

import dataclasses
from typing import Annotated

from jobs.command import Command, Outcome
from pipelines.doctor import examine


@dataclasses.dataclass
class DoctorOptions:
    out: Annotated[str | None, "folder or s3://bucket/prefix to test; null = the working directory"] = None
    address: Annotated[str | None, "Ray cluster's dashboard to test, such as http://127.0.0.1:8265"] = None


def run(options: DoctorOptions) -> Outcome:
    checks = examine(options.out, options.address)
    broken = [check.name for check in checks if not check.ok]
    text = "\n".join([*map(str, checks), "", f"broken: {', '.join(broken)}" if broken else "nothing is broken"])
    values = {"ok": not broken, "broken": broken, "checks": [dataclasses.asdict(check) for check in checks]}
    return Outcome(values, text=text, complete=not broken)


COMMAND = Command(DoctorOptions, run, example="deedsr doctor --out s3://bucket/runs --address http://127.0.0.1:8265")
