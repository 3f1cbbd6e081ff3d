"""MLflow stores, planted broken in every way that is known: in a file and behind a server."""

import sqlite3
import threading
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from libra_ray.config import TrackingConfig
from libra_ray.doctor import aside, stores

NEWEST = stores.known_revisions()[-1]


def store(path, *statements):
    with closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    return path


def versions(*names):
    return ["CREATE TABLE alembic_version (version_num TEXT)", *(f"INSERT INTO alembic_version VALUES ('{n}')" for n in names)]


def checked(path):
    return stores.check_sqlite(f"sqlite:///{path}", path)


def test_the_newest_schema_is_mlflows_own():
    from mlflow.store.db.utils import _get_latest_schema_revision

    assert _get_latest_schema_revision() == NEWEST


def test_good_files(tmp_path):
    good = store(tmp_path / "good.db", "CREATE TABLE runs (id TEXT)", *versions(NEWEST))
    before = good.read_bytes()
    assert checked(good) == str(good)
    assert good.read_bytes() == before
    assert "will be made" in checked(tmp_path / "new.db")
    assert checked(store(tmp_path / "empty.db")) == str(tmp_path / "empty.db")


@pytest.mark.parametrize(
    ("statements", "found", "fix"),
    [
        ([*versions(NEWEST), "CREATE TABLE _alembic_tmp_runs (id TEXT)"], "in the middle of a migration", "mv "),
        (versions(), "in the middle of a migration (it names 0 versions)", "mv "),
        (versions(NEWEST, "0a8213491aaa"), "in the middle of a migration (it names 2 versions)", "mv "),
        (["CREATE TABLE runs (id TEXT)"], "no such table: alembic_version", "mv "),
        (versions("0a8213491aaa"), "the schema of an older MLflow", "uv run mlflow db upgrade sqlite:///"),
        (versions("ffffffffffff"), "made by another MLflow", "uv sync --locked"),
    ],
    ids=["half a table", "no version", "two versions", "no versions", "older", "newer"],
)
def test_broken_files(tmp_path, statements, found, fix):
    path = store(tmp_path / "mlflow.db", *statements)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        checked(path)
    wrong, _, remedy = str(caught.value).partition("; ")
    assert found in wrong
    assert fix in remedy


def test_what_is_no_database(tmp_path):
    (tmp_path / "text.db").write_text("hello " * 1000)
    with pytest.raises(ValueError, match="not a database; mv "):
        checked(tmp_path / "text.db")
    with pytest.raises(ValueError, match="unable to open database file; chmod u"):
        checked(tmp_path)
    with pytest.raises(ValueError, match="does not exist; mkdir -p "):
        checked(tmp_path / "none" / "mlflow.db")


def test_a_file_that_another_process_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE_S", 0.1)
    path = store(tmp_path / "mlflow.db", *versions(NEWEST))
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ValueError, match="database is locked; wait for the job"):
            checked(path)


@contextmanager
def server(status):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"OK")

        def log_message(self, *_):
            pass

    served = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served.server_port, asked
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize(("status", "words"), [(401, "refuses: .*; export MLFLOW_TRACKING_TOKEN"), (404, "not as MLflow does")])
def test_servers_that_refuse(no_proxy, status, words):
    with server(status) as (port, _), pytest.raises(ValueError, match=words):
        stores.check_server(f"http://127.0.0.1:{port}", "here")


def test_a_server_that_is_well_is_asked_with_the_password_and_not_told_of_it(no_proxy):
    with server(200) as (port, asked):
        said = stores.try_store(f"http://me:se%20cret@127.0.0.1:{port}/under/", "runs")
    assert said == f"http://127.0.0.1:{port} answers OK"
    assert asked == [("/under/health", "Basic bWU6c2UgY3JldA==")]


def test_a_server_that_is_away(no_proxy):
    with server(200) as (port, _):
        pass
    for uri in (f"http://127.0.0.1:{port}", f"postgresql://me:secret@127.0.0.1:{port}/mlflow"):
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} does not answer: .*refused.*; ") as caught:
            stores.try_store(uri, "runs")
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "found", "fix"),
    [("mlflow.db is locked; wait", "mlflow.db is locked", "wait"), ("no answer within 60 s", "no answer", "--tracking.uri")],
)
def test_whatever_is_wrong_has_a_fix(monkeypatch, tmp_path, said, found, fix):
    def call(*_, **__):
        raise aside.AsideError(said)

    monkeypatch.setattr(aside, "call", call)
    finding = stores.store(TrackingConfig(), tmp_path)
    assert (finding.level, found in finding.found, fix in finding.fix) == ("blocker", True, True)


def test_before_the_first_job_nothing_is_made(tmp_path):
    assert stores.store(TrackingConfig(), tmp_path / "runs").level == "ok"
    assert not (tmp_path / "runs").exists()
