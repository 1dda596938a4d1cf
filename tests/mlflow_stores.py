"""MLflow stores of tests that are taken away and come back."""

import sqlite3
from contextlib import closing
from pathlib import Path

from mlflow import MlflowClient

from pipelines import tracking


class SqliteStore:
    """A store that can be taken away: its file becomes none of a database."""

    def __init__(self, folder: Path):
        self.path = folder / "mlflow.db"
        self.uri = f"sqlite:///{self.path}"

    def leave(self) -> None:
        with closing(sqlite3.connect(self.path)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # what was written last may lie beside the file
        self.kept = self.path.read_bytes()
        self.path.write_bytes(b"no database")

    def come_back(self) -> None:
        whole = self.path.with_suffix(".kept")
        whole.write_bytes(self.kept)
        whole.replace(self.path)

    def steps(self, run_id: str, name: str = "loss") -> list[int]:
        return [metric.step for metric in MlflowClient(self.uri).get_metric_history(run_id, name)]


def begin(store, **options) -> tracking.Run:
    options = {"name": "run", "config": {"seed": 1}, "system_metrics": False, "fault_tolerant": True} | options
    return tracking.start_run("deedsr-learner", tracking_uri=store.uri, **options)


def log(run, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.log_metrics({"loss": float(step)}, step)
