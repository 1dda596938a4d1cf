"""Creates an SQLite store of MLflow, or migrates one to the installed MLflow, in one process at a time.

MLflow itself does both in place and without a lock, so that processes which start together, or one that is killed,
leave a store that nothing can open again.
"""

import functools
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from deedsr.errors import UsageError
from pipelines.storage.lock import PARTIAL, locked


class StoreAway(UsageError):
    """The MLflow store cannot be reached."""


def sqlite_uri(path: Path) -> str:
    """The store in a file."""
    quoted = str(path).replace("%", "%25").replace("?", "%3F")
    # MLflow makes the folder of what stands behind `sqlite:///` without unquoting it; with the driver's name, none.
    return f"sqlite:///{path}" if quoted == str(path) else f"sqlite+pysqlite:///{quoted}"


def prepare(path: Path) -> None:
    """Brings the store at `path` to the schema of the installed MLflow; other processes wait meanwhile.

    A new store appears under its name when it is whole. An older one is migrated as a copy, which replaces the
    original in one transaction. One that was left half-made by a killed process, and holds nothing, is made again.

    Raises StoreAway where a store that holds something cannot be completed, OSError or sqlite3.Error where the file
    cannot be read or its folder not be written.
    """
    if _version(path) == _newest():
        return
    with locked(path.with_name(f".{path.name}.lock{PARTIAL}")):
        if _version(path) == _newest():  # another process has made it meanwhile
            return
        partial = path.with_name(f".{path.name}.new{PARTIAL}")
        _remove(partial)  # of a process that was killed
        try:
            if _holds_anything(path):
                _migrate(path, partial)
            else:
                _create(partial)
                if not _holds_anything(path):  # a store may have been put back meanwhile
                    partial.replace(path)
        finally:
            _remove(partial)


def _remove(partial: Path) -> None:
    for suffix in ("", "-journal"):
        partial.with_name(partial.name + suffix).unlink(missing_ok=True)


def _create(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # With MLflow's default experiment, which processes that start together would otherwise each try to add.
    store = SqlAlchemyStore(sqlite_uri(path), (path.parent / "mlartifacts").as_uri())
    store.engine.dispose()


def _migrate(path: Path, partial: Path) -> None:
    from alembic.util.exc import CommandError
    from mlflow.store.db.utils import _upgrade_db, create_sqlalchemy_engine
    from sqlalchemy.exc import SQLAlchemyError

    with closing(sqlite3.connect(path)) as original:
        while True:
            before = original.execute("PRAGMA data_version").fetchone()
            with closing(sqlite3.connect(partial)) as copy:
                original.backup(copy)
                for name in _tables(copy):
                    if name.startswith("_alembic_tmp_"):  # a migration that was interrupted left it
                        copy.execute(f"DROP TABLE {name}")
                copy.commit()
            engine = create_sqlalchemy_engine(sqlite_uri(partial))
            try:
                _upgrade_db(engine)
            except CommandError as error:  # a revision that this MLflow does not know
                raise StoreAway(
                    f"the MLflow store {path} was written by a newer MLflow than the installed one ({error}): install "
                    "that one, or set MLFLOW_TRACKING_URI to another store"
                ) from error
            except SQLAlchemyError as error:
                raise StoreAway(
                    f"the MLflow store {path} is half-made: a process that created or migrated it was interrupted. "
                    "Move it away, and a new one is made; or set MLFLOW_TRACKING_URI to another store"
                ) from error
            finally:
                engine.dispose()
            if original.execute("PRAGMA data_version").fetchone() == before:  # else somebody has written to it
                break
        with closing(sqlite3.connect(partial)) as copy:
            copy.backup(original)


def _version(path: Path) -> str | None:
    """Revision of the schema; None where there is no store, or one whose making was interrupted."""
    if not path.exists():
        return None
    with closing(_read(path)) as store:
        if "alembic_version" not in _tables(store):
            return None
        rows = store.execute("SELECT version_num FROM alembic_version").fetchall()
    return rows[0][0] if len(rows) == 1 else None


def _holds_anything(path: Path) -> bool:
    if not path.exists():
        return False
    with closing(_read(path)) as store:
        tables = _tables(store)
        own = {"runs": "1", "registered_models": "1", "experiments": "experiment_id <> 0"}  # 0 is MLflow's default
        return any(
            store.execute(f"SELECT 1 FROM {table} WHERE {condition} LIMIT 1").fetchone()
            for table, condition in own.items()
            if table in tables
        )


def _tables(store: sqlite3.Connection) -> set[str]:
    return {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _read(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=60)


@functools.cache
def _newest() -> str | None:
    """Revision of the schema that the installed MLflow reads."""
    import mlflow.store.db_migrations
    from alembic.script import ScriptDirectory

    return ScriptDirectory(os.path.dirname(mlflow.store.db_migrations.__file__)).get_current_head()
