"""A store in a SQLite file: made by one process at a time, whole or not at all."""

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from mlflow.store.db.utils import _get_latest_schema_revision, _initialize_tables, create_sqlalchemy_engine
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from libra_ray.common.progress import print_status
from libra_ray.common.provenance import masked
from libra_ray.tracking.faults import TrackingError

AN_ADDRESS = "write sqlite:///<path>/mlflow.db or the address of a server"
BUSY_S = 20
"""How long another process may hold the file, as MLflow has it."""
CONTENT = (
    ("experiments", "SELECT 1 FROM experiments WHERE experiment_id != 0 LIMIT 1"),
    ("runs", "SELECT 1 FROM runs LIMIT 1"),
    ("registered_models", "SELECT 1 FROM registered_models LIMIT 1"),
)
"""Tables with something that somebody would miss; experiment 0 is MLflow's own."""

_schema = cache(_get_latest_schema_revision)
"""The newest schema that this MLflow knows."""


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for a server, another database, or SQLite's own `file:` addresses."""
    database = parsed(uri).database if uri.startswith("sqlite") else None
    return None if not database or database.startswith((":memory:", "file:")) else Path(database).resolve()


def parsed(uri: str) -> URL:
    """A database's address in its parts.

    Raises:
        TrackingError: it is none, such as one with letters for a port.
    """
    try:
        return make_url(uri)
    except (ArgumentError, ValueError) as error:
        cause = masked(str(error))
        raise TrackingError(f"tracking.uri={masked(uri)} is no database's address ({cause}); {AN_ADDRESS}") from None


def sqlite_uri(file: Path) -> str:
    """The address of a SQLite store. Nothing is escaped that need not be: MLflow takes it for a path as it stands, too."""
    path = str(file.resolve()).replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{path}"


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Keep other jobs of ours out, while a SQLite store is made or written to in several steps.

    Servers and other databases see to that themselves.
    """
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_whole(file: Path) -> bool:
    """Whether a file is a store of this MLflow; False where it holds nothing, as a process killed while making one leaves it.

    Raises:
        TrackingError: it holds something, but not under this MLflow's schema; the text says what to do.
    """
    if not file.exists() or not file.stat().st_size:
        return False
    with closing(sqlite3.connect(file, timeout=BUSY_S)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "experiments" not in tables:
            raise TrackingError(f"tracking.uri={sqlite_uri(file)} holds other tables than MLflow's; give another file")
        known = database.execute("SELECT version_num FROM alembic_version").fetchone() if "alembic_version" in tables else None
        is_empty = not any(table in tables and database.execute(query).fetchone() for table, query in CONTENT)
    cut_off = any(name.startswith("_alembic_tmp_") for name in tables)
    if known == (_schema(),) and not cut_off:
        return True
    if is_empty:
        return False
    if cut_off:
        remedy = "its migration was cut off; put a copy from before in its place, or move it away and a new one is made"
    else:
        remedy = f"it has the schema of another MLflow; copy it, then run `uv run mlflow db upgrade {sqlite_uri(file)}`"
    raise TrackingError(f"tracking.uri={sqlite_uri(file)} cannot be used as it is: {remedy}")


def make(file: Path) -> None:
    """A new store in the place of one that is not whole, which is kept beside it; the caller is `alone`."""
    staging = file.with_name(f".{file.name}.new")
    for left in (staging, staging.with_name(f"{staging.name}-journal")):
        left.unlink(missing_ok=True)
    engine = create_sqlalchemy_engine(sqlite_uri(staging))
    _initialize_tables(engine)
    engine.dispose()
    if file.exists() and file.stat().st_size:
        number = 1
        while (aside := file.with_name(f"{file.name}.old-{number}")).exists():
            number += 1
        file.rename(aside)
        print_status(f"tracking: {file} was left half made and held nothing; it is kept as {aside.name}")
    staging.replace(file)
