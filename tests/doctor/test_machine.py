"""Each check of the machine: well as it is, and red with its fix where something broken is planted."""

import os
import platform
import shutil
import socket
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from libra_ray.doctor import machine
from libra_ray.doctor.finding import Check, outcome

Usage = namedtuple("Usage", "total used free")
INSTALLED = machine._installed()


def looked(check, *arguments):
    [finding] = outcome(Check(look=lambda: check(*arguments)))
    return finding


def bad(finding, level, found, fix):
    assert finding.level == level, finding
    assert found in finding.found
    assert fix in finding.fix


def test_this_environment_is_as_locked():
    assert looked(machine.python).level == looked(machine.libraries).level == "ok"


@pytest.mark.parametrize("version", ["3.11.9", "3.13.0"])
def test_another_python(monkeypatch, version):
    monkeypatch.setattr(platform, "python_version", lambda: version)
    bad(looked(machine.python), "blocker", f"{version} at {sys.executable}, but >=3.12,<3.13 is needed", "uv sync --locked")


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"mujoco": "4.0.0"}, "blocker", "mujoco 4.0.0 (<3.9,>=3.8 needed)"),
        ({"lerobot": "0.5.0", "ray": "2.59.0"}, "blocker", "ray 2.59.0 (==2.60.* needed), lerobot 0.5.0"),
        ({"numpy": "1.26.4"}, "blocker", "numpy 1.26.4"),
        ({"metaworld": None, "av": None}, "blocker", "av missing"),
        ({"numpy": "2.99.0"}, "warning", "numpy 2.99.0"),
        ({"pandas": "0.1"}, "warning", "pandas 0.1"),
        ({"another-library": "1.0"}, "ok", "as in uv.lock"),
    ],
)
def test_other_libraries(change, level, words):
    found = {name: version for name, version in (INSTALLED | change).items() if version}
    bad(looked(machine.libraries, found), level, words, "" if level == "ok" else "uv sync --locked")


@pytest.mark.parametrize(
    ("free", "level", "found"),
    [
        (10**6, "blocker", "1.0 GB are needed for a small run"),
        (2**32, "warning", "4.3 GB free"),
        (10**13, "ok", "free"),
    ],
)
def test_room_of_the_runs(tmp_path, monkeypatch, free, level, found):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**41, 0, free))
    bad(looked(machine.runs_folder, tmp_path / "runs"), level, found, "" if level == "ok" else "make room")
    assert not (tmp_path / "runs").exists()


def test_a_runs_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    bad(looked(machine.runs_folder, tmp_path / "file" / "runs"), "blocker", "is not a folder", "--runs FOLDER")
    bad(looked(machine.runs_folder, Path("/proc/runs")), "blocker", "/proc cannot be written to", "--runs FOLDER")


def test_little_shared_memory(tmp_path, monkeypatch):
    bad(looked(machine.shared_memory, tmp_path / "none"), "warning", "does not exist", "--shm-size=8g")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**26, 0, 2**26))
    bad(looked(machine.shared_memory, tmp_path), "warning", "67.1 MB free", "--shm-size=8g")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**36))
    assert looked(machine.shared_memory, tmp_path).level == "ok"


def test_a_home_that_is_none(monkeypatch, tmp_path):
    for folder, words in (("/no/such/home", "does not exist"), ("/proc", "cannot be written to")):
        monkeypatch.setenv("HOME", folder)
        bad(looked(machine.home), "warning", f"{folder} {words}", "export HOME=FOLDER")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert looked(machine.home).level == "ok"


@pytest.mark.parametrize(
    ("used", "level", "found"), [("ascii", "warning", "standard output is ascii"), ("UTF-8", "ok", "UTF-8"), ("utf8", "ok", "")]
)
def test_another_encoding(monkeypatch, used, level, found):
    monkeypatch.setattr(machine.sys, "stdout", SimpleNamespace(encoding=used))
    bad(looked(machine.encoding), level, found, "" if level == "ok" else "export LC_ALL=C.UTF-8")


@pytest.mark.parametrize(
    ("environment", "level", "found"),
    [
        ({}, "ok", "none"),
        ({"http_proxy": "http://me:secret@proxy:3128"}, "warning", "127.0.0.1 and localhost go to the proxy in http_proxy"),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "localhost"}, "warning", "requests to 127.0.0.1 go"),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "localhost,127.0.0.1"}, "ok", "not for this"),
        ({"ALL_PROXY": "socks5://proxy:1080", "NO_PROXY": "*"}, "ok", "all_proxy"),
    ],
)
def test_proxies(monkeypatch, environment, level, found):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = looked(machine.proxies)
    bad(finding, level, found, "" if level == "ok" else "export NO_PROXY=127.0.0.1,localhost")
    assert "secret" not in finding.found


def test_a_taken_port_names_its_owner():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        bad(
            looked(machine.ports, {port: "the gateways"}),
            "warning",
            f"{port} (the gateways) is taken by process {os.getpid()}",
            "end",
        )
    assert looked(machine.ports, {port: "the gateways"}).level == "ok"
