"""Ray's address, token, leftovers and sockets: red with a fix where something broken is planted, and a cluster is joined."""

import os
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest

from libra_ray.doctor import aside
from libra_ray.on_ray import doctor

HOME = str(Path.home())
RAY_VARIABLES = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_TMPDIR",
)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in RAY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@contextmanager
def listening():
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        somebody.listen()
        yield f"127.0.0.1:{somebody.getsockname()[1]}"


def dead_address():
    with listening() as address:
        pass
    return address


def refuse_to_answer(*_, **__):
    raise aside.AsideError("no answer within 60 s")


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("http://127.0.0.1:8265", "RAY_ADDRESS=http://127.0.0.1:8265 is the dashboard's"),
        ("https://head/ray", "is the dashboard's"),
        ("head", "RAY_ADDRESS=head is no address"),
        ("head:port", "is no address"),
        (":6379", "is no address"),
        ("127.0.0.1:99999", "nothing answers at"),
    ],
)
def test_addresses_that_lead_nowhere(monkeypatch, address, found):
    monkeypatch.setenv("RAY_ADDRESS", address)
    finding = doctor.address()
    assert finding.level == "blocker"
    assert found in finding.found
    assert "unset RAY_ADDRESS" in finding.fix


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_dead_cluster(monkeypatch, scheme):
    monkeypatch.setenv("RAY_ADDRESS", scheme + dead_address())
    finding = doctor.address()
    assert finding.level == "blocker"
    assert "refused" in finding.found
    assert "unset RAY_ADDRESS" in finding.fix


@pytest.mark.parametrize("auto", [False, True])
def test_something_answers_that_cannot_be_joined(monkeypatch, auto):
    monkeypatch.setattr(aside, "call", refuse_to_answer)
    with listening() as address:
        monkeypatch.setenv("RAY_ADDRESS", "auto" if auto else address)
        finding = doctor.address()
    assert finding.level == "blocker"
    assert "cannot be joined: no answer within 60 s" in finding.found


def test_without_an_address():
    assert doctor.address().level == "ok"


def test_a_living_cluster_is_joined(monkeypatch, ray_cluster):
    import ray

    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    finding = doctor.address()
    assert finding.level == "ok", finding
    assert finding.found.endswith("a cluster with 4 CPUs")


@pytest.mark.parametrize(
    ("environment", "there", "level", "found"),
    [
        ({}, False, "ok", "none"),
        ({}, True, "ok", "auth_token, mode not set"),
        ({"RAY_AUTH_MODE": "token"}, True, "ok", "auth_token, mode token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, False, "ok", "RAY_AUTH_TOKEN, mode token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "head:6379"}, True, "ok", "mode disabled"),
        ({"RAY_AUTH_MODE": "token"}, False, "blocker", "there is no token in"),
        ({"RAY_AUTH_MODE": "tokens"}, True, "blocker", "RAY_AUTH_MODE=tokens is unknown"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}, True, "warning", "`ray job submit` does not send"),
        ({"RAY_ADDRESS": "head:6379"}, True, "warning", "`ray job submit` does not send"),
    ],
)
def test_tokens(monkeypatch, tmp_path, environment, there, level, found):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if there:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    finding = doctor.token()
    assert finding.level == level
    assert found in finding.found
    assert ("RAY_AUTH_MODE" in finding.fix) == (level != "ok")


def test_the_address_that_a_cluster_left_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert doctor.leftover().found == "none"
    left = tmp_path / "ray" / "ray_current_cluster"
    left.parent.mkdir()
    with listening() as alive:
        left.write_text(alive)
        assert doctor.leftover().level == "ok"
    for written in (alive, "", "nonsense"):
        left.write_text(written)
        finding = doctor.leftover()
        assert (finding.level, finding.fix) == ("blocker", f"rm {left}")


@pytest.mark.parametrize(
    ("variable", "folder", "words"),
    [
        ("TMPDIR", "/tmp/" + "x" * 60, "is too long for Ray's sockets"),
        ("RAY_TMPDIR", "/tmp/" + "ü" * 30, "is too long for Ray's sockets"),
        ("TMPDIR", "/no/such/folder", "does not exist"),
        ("RAY_TMPDIR", "/proc", "cannot be written to"),
    ],
)
def test_a_folder_that_rays_sockets_cannot_be_in(monkeypatch, variable, folder, words):
    monkeypatch.setenv(variable, folder)
    finding = doctor.sockets()
    assert finding.level == "blocker"
    assert f"{variable}={folder} {words}" in finding.found
    assert finding.fix.startswith("export RAY_TMPDIR=/tmp")


def test_the_usual_folder_is_short_enough(monkeypatch):
    monkeypatch.delenv("TMPDIR", raising=False)
    assert doctor.sockets().level == "ok"


def test_the_socket_is_as_long_as_rays_own(ray_cluster):
    """A session's socket has the length that the check reckons with, but for the digits of the process's number."""
    from ray._private.worker import global_worker

    socket_path = Path(global_worker.node.plasma_store_socket_name)
    reckoned = doctor.SOCKET_OF_SESSION.format(pid=os.getpid())
    assert len(socket_path.as_posix().split("/ray/session_", 1)[1]) == len(reckoned.split("ray/session_", 1)[1])
