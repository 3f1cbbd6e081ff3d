"""Ray's address, token and folder: red with a fix where something broken is planted, and a cluster is joined."""

import socket

import pytest

from libra_ray.doctor import aside
from libra_ray.doctor.finding import Check, outcome
from libra_ray.on_ray import doctor, ray_private

RAY_VARIABLES = (
    "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "TMPDIR",
)  # fmt: skip


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in RAY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def looked(check):
    return outcome(Check(look=check, fix="mend it"))


def closed_address():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"127.0.0.1:{closed.getsockname()[1]}"


def here(function, *arguments, limit_s):
    """The call, without the process of its own."""
    assert limit_s > 0
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise aside.AsideError(str(error)) from error


def test_an_address_that_leads_nowhere(monkeypatch):
    address = closed_address()
    monkeypatch.setenv("RAY_ADDRESS", address)
    [finding] = looked(doctor.address)
    assert finding.level == "blocker"
    assert f"RAY_ADDRESS='{address}'" in finding.found
    assert "unset RAY_ADDRESS" in finding.fix


def test_something_answers_that_cannot_be_joined(monkeypatch):
    def refuse_to_answer(*_, **__):
        raise aside.AsideError("no answer within 60 s")

    monkeypatch.setattr(aside, "call", refuse_to_answer)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    [finding] = looked(doctor.address)
    assert (finding.level, finding.found) == ("blocker", "no answer within 60 s")


@pytest.mark.parametrize("address", ["", "local"])
def test_without_an_address(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    [finding] = looked(doctor.address)
    assert (finding.level, finding.found) == ("ok", "none, each job starts a cluster of its own")


def test_a_living_cluster_is_joined(monkeypatch, ray_cluster):
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    # What this process started it with: a home folder has one only where somebody wrote it there.
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_private.user_token())
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    [finding] = looked(doctor.address)
    assert finding.level == "ok", finding
    assert finding.found.endswith("a cluster with 4 CPUs")


@pytest.mark.parametrize(
    ("environment", "there", "level", "found"),
    [
        ({}, False, "ok", "none"),
        ({}, True, "ok", "auth_token, RAY_AUTH_MODE is not set"),
        ({"RAY_AUTH_MODE": "token"}, True, "ok", "auth_token, RAY_AUTH_MODE is token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, False, "ok", "RAY_AUTH_TOKEN, RAY_AUTH_MODE is token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_API_SERVER_ADDRESS": "http://x"}, True, "ok", "is disabled"),
        ({"RAY_AUTH_MODE": "token"}, False, "warning", "there is none in"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}, True, "warning", "`ray job submit` does not send"),
    ],
)
def test_tokens(monkeypatch, tmp_path, environment, there, level, found):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if there:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    [finding] = looked(doctor.token)
    assert finding.level == level
    assert found in finding.found
    assert ("RAY_AUTH_MODE" in finding.fix) == (level != "ok")


def test_a_tmpdir_that_is_passed_over_and_a_ray_tmpdir_that_ends_jobs(monkeypatch):
    too_long = f"/tmp/{'x' * 90}"
    monkeypatch.setenv("TMPDIR", too_long)
    passed_over, *_ = looked(doctor.folder)
    assert passed_over.level == "warning"
    assert f"TMPDIR={too_long} is too long" in passed_over.found
    for folder in (too_long, "/proc"):
        monkeypatch.setenv("RAY_TMPDIR", folder)
        [finding] = looked(doctor.folder)
        assert finding.level == "blocker"
        assert f"RAY_TMPDIR={folder} " in finding.found
        assert finding.fix.startswith("set RAY_TMPDIR to a folder")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    [finding] = looked(doctor.folder)
    assert finding.level == "ok", "a cluster has a folder of its own"


def test_the_address_that_a_dead_cluster_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(aside, "call", here)
    monkeypatch.setattr(doctor.machine, "sessions_folder", lambda: (str(tmp_path), ""))
    assert [finding.level for finding in looked(doctor.folder)] == ["ok"]
    left = tmp_path / "ray" / "ray_current_cluster"
    left.parent.mkdir()
    for written in (closed_address(), "nonsense", ""):
        left.write_text(written)
        good, bad = looked(doctor.folder)
        assert (good.level, bad.level, bad.fix) == ("ok", "warning", f"rm {left}")
        assert str(left) in bad.found


def test_the_address_of_a_living_cluster(monkeypatch, tmp_path, ray_cluster):
    import ray

    monkeypatch.setattr(aside, "call", here)
    monkeypatch.setattr(doctor.machine, "sessions_folder", lambda: (str(tmp_path), ""))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
    assert [finding.level for finding in looked(doctor.folder)] == ["ok"]
