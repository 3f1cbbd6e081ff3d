"""The MLflow store as the jobs would find it; what cannot be used there is said, with a fix."""

import os
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from libra_ray.config import override, preset, to_json
from libra_ray.doctor import aside, stores
from libra_ray.doctor.finding import Check, outcome


def config(**tracking):
    return override(preset("debug"), {f"tracking.{name}": value for name, value in tracking.items()})


def said(runs, **tracking):
    """What one check finds, without the process of its own."""
    [finding] = outcome(Check(look=lambda: stores.try_store(to_json(config(**tracking)), str(runs)), fix=stores.FIX))
    return finding


def test_before_the_first_job_nothing_is_made(tmp_path):
    for runs in (tmp_path / "runs", tmp_path):
        finding = said(runs)
        assert (finding.level, finding.found) == ("ok", f"{runs}/mlflow.db will be made by the first job")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_store(tmp_path):
    (tmp_path / "mlflow.db").write_text("hello " * 1000)
    finding = said(tmp_path)
    assert finding.level == "blocker"
    assert f"{tmp_path}/mlflow.db" in finding.found
    assert "--tracking.uri" in finding.fix


def test_what_cannot_be_written_to(tmp_path, monkeypatch):
    finding = said("/proc/runs")
    assert (finding.level, "cannot be written to" in finding.found) == ("blocker", True)
    (tmp_path / "mlflow.db").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    finding = said(tmp_path)
    assert (finding.level, finding.found) == ("blocker", f"{tmp_path}/mlflow.db cannot be written to")
    assert "--tracking.uri" in finding.fix


@pytest.fixture(params=[401, 404])
def other_server(request):
    """A server that is none of MLflow's, or wants to know who asks."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(request.param)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, request.param
        server.shutdown()


def test_a_server_that_answers_but_not_as_mlflow_does(other_server):
    port, status = other_server
    finding = said("runs", uri=f"http://me:secret@127.0.0.1:{port}")
    assert finding.level == "blocker"
    assert str(status) in finding.found
    assert "secret" not in finding.found + finding.fix


def test_a_store_that_is_not_required_is_no_blocker(monkeypatch, tmp_path):
    def call(*_, **__):
        raise aside.AsideError("nobody is there")

    monkeypatch.setattr(aside, "call", call)
    for required, level in (("true", "blocker"), ("false", "warning")):
        look = partial(stores.store, config(required=required), tmp_path)
        [finding] = outcome(Check(look=look, fix=stores.FIX))
        assert (finding.level, finding.found, finding.fix) == (level, "nobody is there", stores.FIX)
