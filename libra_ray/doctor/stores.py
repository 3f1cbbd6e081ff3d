"""The MLflow store: whether it answers, can be written to, and has a schema that the installed MLflow knows."""

import importlib.util
import re
import socket
import sqlite3
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from libra_ray.config import TrackingConfig
from libra_ray.doctor import aside
from libra_ray.doctor.finding import Finding

PATIENCE_S = 10.0
NEXT = "mend it, or give another one: --tracking.uri sqlite:///FOLDER/mlflow.db"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def store(tracking: TrackingConfig, runs: Path, limit_s: float = 60) -> Finding:
    """The store that the jobs would write to."""
    if not tracking.uri and not runs.is_dir():
        return Finding.ok("mlflow", f"{runs / 'mlflow.db'} will be made by the first job")
    try:
        return Finding.ok("mlflow", aside.call(try_store, tracking.uri, str(runs), limit_s=limit_s))
    except aside.AsideError as error:
        return Finding.refused("mlflow", error, NEXT)


def try_store(uri: str, runs: str) -> str:
    """What the store says, in words.

    Raises:
        ValueError: it cannot be used; says why, and after a semicolon what to do.
    """
    from libra_ray.tracking import tracking_uri

    address = tracking_uri(TrackingConfig(uri=uri), Path(runs))
    scheme = address.split("://")[0].split("+")[0]
    if scheme == "sqlite":
        return check_sqlite(address, Path(address.partition(":///")[2]))
    place = urlsplit(address)
    shown = f"{scheme}://{place.hostname}" + (f":{place.port}" if place.port else "")
    if scheme in ("http", "https"):
        return check_server(address, shown)
    if scheme in DATABASE_PORTS and place.hostname:
        try:
            socket.create_connection((place.hostname, place.port or DATABASE_PORTS[scheme]), PATIENCE_S).close()
        except OSError as error:
            raise ValueError(f"{shown} does not answer: {error}; {NEXT}") from None
        return f"{shown} answers"
    return f"{shown}, not looked into"


def check_sqlite(address: str, path: Path) -> str:
    """The store in a file, which need not exist yet."""
    if not path.exists():
        folder = path.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist; mkdir -p {folder}")
        return f"{path} will be made by the first job"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=PATIENCE_S)) as database:
            database.execute("BEGIN IMMEDIATE")
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            versions = [row[0] for row in database.execute("SELECT version_num FROM alembic_version")] if tables else []
            # A transaction alone does not notice that the file is read-only.
            database.execute("CREATE TABLE libra_ray_doctor (number INTEGER)")
            database.rollback()
    except sqlite3.Error as error:
        raise ValueError(f"{path}: {error}; {_fix_of(path, str(error))}") from None
    if half := sorted(name for name in tables if name.startswith("_alembic_tmp_")):
        raise ValueError(f"{path} was left in the middle of a migration ({', '.join(half)} is there); {_fix_of(path)}")
    if tables and len(versions) != 1:
        raise ValueError(f"{path} was left in the middle of a migration (it names {len(versions)} versions); {_fix_of(path)}")
    if versions and versions != known_revisions()[-1:]:
        if versions[0] not in known_revisions():
            raise ValueError(f"{path} was made by another MLflow, maybe a newer one; uv sync --locked, or {_fix_of(path)}")
        raise ValueError(f"{path} has the schema of an older MLflow; uv run mlflow db upgrade {address}")
    return str(path)


def check_server(address: str, shown: str) -> str:
    """A server's own word that it is well."""
    place = urlsplit(address)
    account, at, host = place.netloc.rpartition("@")
    health = place._replace(netloc=host, path=f"{place.path.rstrip('/')}/health").geturl()
    login = {"Authorization": f"Basic {b64encode(unquote(account).encode()).decode()}"} if at else {}
    try:
        asked = urllib.request.Request(health, headers=login)  # noqa: S310  (http and https only)
        with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:  # noqa: S310
            return f"{shown} answers {answer.read(20).decode(errors='replace')}"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ValueError(f"{shown} refuses: {error}; export MLFLOW_TRACKING_TOKEN=... or USERNAME and PASSWORD") from None
        raise ValueError(f"{shown} answers, but not as MLflow does: {error}; {NEXT}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{shown} does not answer: {reason}; start it, or give another one: --tracking.uri URI") from None


def known_revisions() -> list[str]:
    """The revisions of the schema that the installed MLflow knows, the newest last; read as files, which is quick."""
    spec = importlib.util.find_spec("mlflow")
    folders = spec.submodule_search_locations if spec else None
    paths = Path(folders[0], "store", "db_migrations", "versions").glob("*.py") if folders else ()
    texts = [path.read_text(encoding="utf-8") for path in paths]
    revisions = {found[1] for text in texts if (found := re.search(r'^revision = "(\w+)"', text, re.MULTILINE))}
    before = {found[1] for text in texts if (found := re.search(r'^down_revision = "(\w+)"', text, re.MULTILINE))}
    return [*sorted(revisions & before), *sorted(revisions - before)]


def _fix_of(path: Path, error: str = "") -> str:
    if "locked" in error:
        return "wait for the job that writes to it, or end it"
    if "readonly" in error or "unable to open" in error:
        return f"chmod u+w {path} and its folder, or give another one: --tracking.uri URI"
    return f"mv {path} {path}.old (a new one is made), or restore a copy"
