"""List MLflow runs, newest first: name, status, time and result.

In the store of MLFLOW_TRACKING_URI. `deedsr runs show RUN` has everything of one run, `deedsr compare` the differences.
"""

from typing import TYPE_CHECKING

from jobs.command import Command, Outcome
from jobs.compare import RunsOptions

if TYPE_CHECKING:
    from pipelines.reports.run_rows import BareRow


def run(options: RunsOptions) -> Outcome:
    from pipelines.reports.run_rows import rows_of
    from pipelines.reports.tables import text_table
    from pipelines.tracking.store import existing_store

    rows = rows_of(existing_store("runs list"), options.experiment, options.filter, options.last)
    cells = [[row["name"], row["run_id"][:8], row["status"].lower(), *_texts(row)] for row in rows]
    header = ["run", "id", "status", "started", "time", "result", "experiment"]
    return Outcome({"runs": rows}, text=text_table("", header, cells, 3))


def _texts(row: "BareRow") -> list[str]:
    from pipelines.reports.tables import duration_text, metric_text

    time = "running" if row["seconds"] is None else duration_text(row["seconds"])
    name, value = next(iter(row["metrics"].items()), ("", None))
    result = "" if value is None else f"{name} {metric_text(value, name.rpartition('.')[2])}"
    return [row["started"][:16].replace("T", " "), time, result, row["experiment"]]


COMMAND = Command(RunsOptions, run, example="deedsr runs list --experiment deedsr-adapter --last 20")
