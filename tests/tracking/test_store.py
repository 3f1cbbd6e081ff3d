"""The store behind an address: whole or not there, asked once before it is used, and its faults one line that names it."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from libra_ray.config import TrackingConfig
from libra_ray.tracking import Tracker, TrackingError, sqlite, tracking_uri
from tests.tracking.conftest import Away

OLD = (
    "CREATE TABLE experiments (experiment_id INTEGER, name TEXT)",
    "CREATE TABLE runs (run_uuid TEXT)",
    "CREATE TABLE alembic_version (version_num TEXT)",
    "INSERT INTO alembic_version VALUES ('451aebb31d03')",
)
CUT_OFF = (*OLD, "CREATE TABLE _alembic_tmp_metrics (key TEXT)")
A_RUN = "INSERT INTO runs VALUES ('mine')"


@pytest.fixture
def quick(runs, monkeypatch) -> None:
    """MLflow's tables without the seconds that its migrations take."""
    monkeypatch.setattr(sqlite, "_initialize_tables", lambda engine: shutil.copyfile(runs / "mlflow.db", engine.url.database))


def refused(tracking: TrackingConfig, folder: Path) -> str:
    """The one line with which a job does not begin."""
    with pytest.raises(TrackingError) as error:
        Tracker.start(tracking, folder, "run")
    assert "\n" not in str(error.value)
    return str(error.value)


def filled(file: Path, *statements: str) -> bytes:
    """A SQLite file with that in it."""
    with closing(sqlite3.connect(file)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    return file.read_bytes()


def test_a_job_killed_while_making_the_store_leaves_none(tmp_path, quick, monkeypatch):
    def killed(engine):
        Path(engine.url.database).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "_initialize_tables", killed)
        with pytest.raises(KeyboardInterrupt):
            Tracker.start(TrackingConfig(), tmp_path, "run")
    assert not (tmp_path / "mlflow.db").exists()
    with Tracker.start(TrackingConfig(), tmp_path, "run"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


@pytest.mark.parametrize("left", [(), OLD[:1], OLD[:3], OLD, CUT_OFF])
def test_a_half_made_store_without_content_is_made_anew(tmp_path, quick, capsys, left):
    before = filled(tmp_path / "mlflow.db", *left)
    with Tracker.start(TrackingConfig(), tmp_path, "run"):
        pass
    said = capsys.readouterr().err
    if before:
        assert (tmp_path / "mlflow.db.old-1").read_bytes() == before, "nothing is ever deleted"
        assert str(tmp_path / "mlflow.db") in said
    else:
        assert said == ""


@pytest.mark.parametrize(
    ("left", "remedy"),
    [
        ((*CUT_OFF, A_RUN), "put a copy from before in its place, or move it away"),
        ((*OLD, A_RUN), "uv run mlflow db upgrade sqlite:///{file}"),
        (("CREATE TABLE songs (title TEXT)",), "give another file"),
        (("CREATE TABLE experiments (experiment_id INTEGER)", "INSERT INTO experiments VALUES (7)"), "db upgrade"),
    ],
)
def test_a_store_with_content_that_does_not_fit_is_refused_and_left_alone(tmp_path, quick, left, remedy):
    file = tmp_path / "mlflow.db"
    before = filled(file, *left)
    said = refused(TrackingConfig(), tmp_path)
    assert str(file) in said
    assert remedy.format(file=file) in said
    assert file.read_bytes() == before


@pytest.mark.parametrize("odd", ["with space", "per%20cent", "hash#1", "query?x", "ümläut", "quote'd", "a+b"])
def test_an_odd_folder_holds_the_store_and_the_artifacts(tmp_path, quick, odd):
    """No file lands beside it, and a second job finds the same store."""
    runs = tmp_path / odd
    (tmp_path / "report.html").write_text("page")
    for _ in range(2):
        with Tracker.start(TrackingConfig(experiment=odd), runs, "run") as tracker:
            tracker.log_artifact(tmp_path / "report.html")
    assert {path.name for path in runs.iterdir()} == {".mlflow.db.lock", "mlflow.db", "mlartifacts"}
    assert len(list(runs.rglob("report.html"))) == 2
    beside = [path for path in tmp_path.rglob("*") if path.is_file() and runs not in path.parents]
    assert beside == [tmp_path / "report.html"]


def test_a_full_disk_is_one_line(tmp_path, quick, disk_full):
    with disk_full():
        assert str(tmp_path / "mlflow.db") in refused(TrackingConfig(), tmp_path)


def test_a_store_that_may_only_be_read_is_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MLflow makes a folder by the address's name
    uri = f"sqlite:///file:{runs / 'mlflow.db'}?mode=ro&uri=true"
    assert "readonly" in refused(TrackingConfig(uri=uri), tmp_path)


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be looked at" * 9, None])
def test_what_is_no_database_is_one_line(tmp_path, content):
    file = tmp_path / "mlflow.db"
    file.write_bytes(content) if content else file.mkdir()
    assert str(file) in refused(TrackingConfig(), tmp_path)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"])
def test_a_server_that_is_away_is_asked_once(tmp_path, answer):
    """MLflow itself asks eight times, for minutes."""
    server = Away(answer)
    assert f"tracking.uri={server.uri} does not answer" in refused(TrackingConfig(uri=server.uri), tmp_path)
    assert server.asked == 1
    server.close()


@pytest.mark.parametrize("scheme", ["http://me:secret@", "postgresql://me:secret@", "mysql+pymysql://me:secret@"])
def test_nobody_at_the_address_is_one_line_without_the_password(tmp_path, away, scheme):
    away.close()
    uri = f"{scheme}{away.uri.removeprefix('http://')}/mlflow"
    said = refused(TrackingConfig(uri=uri), tmp_path)
    assert f"tracking.uri={uri.replace('me:secret', '***')} does not answer" in said
    assert "secret" not in said


@pytest.mark.parametrize("uri", ["htp://nowhere", "postgresql:///db"])
def test_an_address_that_mlflow_cannot_use_is_one_line(tmp_path, uri):
    assert uri in refused(TrackingConfig(uri=uri), tmp_path)


@pytest.mark.parametrize("uri", ["mysql+pymysql://me:secret@host:port/db", "sqlite://:port"])
def test_what_is_no_address_is_one_line(tmp_path, uri):
    said = refused(TrackingConfig(uri=uri), tmp_path)
    assert "is no database's address" in said
    assert "secret" not in said


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_a_store_that_ends_with_the_job_is_refused(tmp_path, uri):
    with pytest.raises(ValueError, match="in memory, which ends with the job; write sqlite:///"):
        Tracker.start(TrackingConfig(uri=uri), tmp_path, "run")


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "mlruns", "/somewhere/mlruns"])
def test_a_folder_as_store_is_refused(tmp_path, uri):
    with pytest.raises(ValueError, match="sqlite:///"):
        Tracker.start(TrackingConfig(uri=uri), tmp_path, "run")


def test_an_address_is_the_same_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("", "sqlite:///runs/mlflow.db", f"sqlite:///{tmp_path}/runs/mlflow.db"):
        assert tracking_uri(TrackingConfig(uri=uri), Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    for uri in ("https://host/mlflow", "postgresql://host/db", "databricks"):
        assert tracking_uri(TrackingConfig(uri=uri), Path("runs")) == uri
