"""An SQLite store is created and migrated by one process, whole or not at all; each case with MLflow's own schema."""

import contextlib
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from mlflow import MlflowClient
from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine
from training_process import run_script

from deedsr.errors import UsageError
from pipelines import tracking
from pipelines.tracking import sqlite

COMMAND = """
import os, sys
from pipelines import tracking
name, uri = os.environ["RANK"], sys.argv[1]
run = tracking.start_run("deedsr-shards", name=name, config={}, tracking_uri=uri, system_metrics=False)
run.log_metrics({"samples": 1.0}, 1)
run.finish()
"""


def run_names(path: Path) -> list[str]:
    client = MlflowClient(f"sqlite:///{path}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return sorted(run.info.run_name for run in client.search_runs(experiments))


def at_revision(path: Path, revision: str) -> None:
    """Makes the store of an older MLflow, as that one did."""
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = create_sqlalchemy_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    config = _get_alembic_config(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def older_revision() -> str:
    script = ScriptDirectory.from_config(_get_alembic_config(""))
    return str(script.get_revision(script.get_current_head()).down_revision)


def test_commands_that_start_together_share_a_store_that_was_not_there(tmp_path):
    path = tmp_path / "new" / "mlflow.db"
    run_script(COMMAND, 3, [f"sqlite:///{path}"], tmp_path)
    assert run_names(path) == ["0", "1", "2"]
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["mlartifacts", "mlflow.db"]


def test_a_store_of_an_older_mlflow_is_migrated_with_its_runs(tmp_path):
    path = tmp_path / "mlflow.db"
    at_revision(path, older_revision())
    with contextlib.closing(sqlite3.connect(path)) as store:
        store.execute("INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'old', 'active')")
        store.commit()
    client = tracking.connect(f"sqlite:///{path}")
    assert client.get_experiment_by_name("old").experiment_id == "7"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_store_that_was_left_half_made_is_made_again_where_it_holds_nothing(tmp_path):
    path = tmp_path / "mlflow.db"
    script = ScriptDirectory.from_config(_get_alembic_config(""))
    at_revision(path, [revision.revision for revision in script.walk_revisions()][-3])
    with contextlib.closing(sqlite3.connect(path)) as store:  # as a killed process leaves a migration
        store.execute("CREATE TABLE _alembic_tmp_tags (key TEXT)")
    tracking.connect(f"sqlite:///{path}")
    assert run_names(path) == []


def test_a_half_made_store_a_newer_one_and_a_missing_right_are_told_apart(empty_store, tmp_path):
    def connect_to(revision: str, *statements: str) -> str:
        path = tmp_path / revision / "mlflow.db"
        path.parent.mkdir()
        shutil.copy(empty_store, path)
        with contextlib.closing(sqlite3.connect(path)) as store:
            store.execute("INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'old', 'active')")
            store.execute("UPDATE alembic_version SET version_num = ?", (revision,))
            store.commit()
        before = path.read_bytes()
        with pytest.raises(UsageError) as error:
            tracking.connect(f"sqlite:///{path}")
        assert path.read_bytes() == before
        return str(error.value)

    assert "half-made" in connect_to(older_revision())  # the last migration was applied and not recorded
    assert "newer MLflow" in connect_to("ffffffffffff")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="must be a folder that you may write"):
        tracking.connect(f"sqlite:///{tmp_path}/file/mlflow.db")
    (tmp_path / "mlflow.db").write_bytes(b"a letter to somebody")
    with pytest.raises(UsageError, match="is no store of MLflow"):
        tracking.connect(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_process_that_is_killed_while_it_makes_a_store_leaves_nothing_in_its_place(tmp_path):
    path = tmp_path / "mlflow.db"
    kill = "import os, signal, pathlib; from pipelines.tracking import sqlite; "
    kill += "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
    words = [sys.executable, "-c", f"{kill} sqlite.prepare(pathlib.Path({str(path)!r}))"]
    assert subprocess.run(words).returncode == -9
    assert not path.exists()
    sqlite.prepare(path)
    assert run_names(path) == []


def test_a_store_that_is_put_back_while_a_new_one_is_made_stays(empty_store, tmp_path, monkeypatch):
    path, kept = tmp_path / "mlflow.db", tmp_path / "kept.db"
    shutil.copy(empty_store, kept)
    client = MlflowClient(f"sqlite:///{kept}")
    run_id = client.create_run(client.create_experiment("theirs")).info.run_id
    create = sqlite._create

    def create_beside(partial: Path) -> None:
        create(partial)
        shutil.copy(kept, path)

    path.touch()  # as a copy that begins
    monkeypatch.setattr(sqlite, "_create", create_beside)
    sqlite.prepare(path)
    assert MlflowClient(f"sqlite:///{path}").get_run(run_id)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["kept.db", "mlflow.db"]
