"""Each check of the machine: well as it is, and red with its fix where something broken is planted."""

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from libra_ray.doctor import machine

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")
INSTALLED = machine._installed()


def bad(finding, level, found, fix):
    assert finding.level == level, finding
    assert found in finding.found
    assert fix in finding.fix


def test_this_environment_is_as_locked():
    assert machine.python().level == machine.libraries().level == "ok"


@pytest.mark.parametrize("version", ["3.11.9", "3.13.0"])
def test_another_python(monkeypatch, version):
    monkeypatch.setattr(platform, "python_version", lambda: version)
    bad(machine.python(), "blocker", f"{version} at {sys.executable}, but >=3.12,<3.13 is needed", "uv sync --locked")


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"mujoco": "4.0.0"}, "blocker", "mujoco 4.0.0 (<3.9,>=3.8 needed)"),
        ({"lerobot": "0.5.0", "ray": "2.59.0"}, "blocker", "ray 2.59.0 (==2.60.* needed), lerobot 0.5.0"),
        ({"numpy": "1.26.4"}, "blocker", "numpy 1.26.4"),
        ({"metaworld": None, "av": None}, "blocker", "metaworld, av missing"),
        ({"numpy": "2.99.0"}, "warning", "numpy 2.99.0"),
        ({"pandas": "0.1"}, "warning", "pandas 0.1"),
        ({"another-library": "1.0"}, "ok", "as in uv.lock"),
    ],
)
def test_other_libraries(change, level, words):
    found = {name: version for name, version in (INSTALLED | change).items() if version}
    bad(machine.libraries(found), level, words, "" if level == "ok" else "uv sync --locked")


@pytest.mark.parametrize(
    ("free", "level", "found"),
    [(2**20, "blocker", "0.0 GiB free; a run needs"), (2**32, "warning", "4.0 GiB free"), (2**40, "ok", "1024.0 GiB free")],
)
def test_room_of_the_runs(tmp_path, monkeypatch, free, level, found):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**41, 0, free))
    bad(machine.runs_folder(tmp_path / "runs"), level, found, "" if level == "ok" else "--runs FOLDER")
    assert not (tmp_path / "runs").exists()


def test_a_runs_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    bad(machine.runs_folder(tmp_path / "file" / "runs"), "blocker", "is not a folder", "--runs FOLDER")
    bad(machine.runs_folder(Path("/proc/runs")), "blocker", "/proc cannot be written to", "--runs FOLDER")


def test_little_shared_memory(tmp_path, monkeypatch):
    bad(machine.shared_memory(tmp_path / "none"), "warning", "does not exist", "--shm-size=8g")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**26, 0, 2**26))
    bad(machine.shared_memory(tmp_path), "warning", "0.1 GiB free", "--shm-size=8g")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**36))
    assert machine.shared_memory(tmp_path).level == "ok"


def test_a_home_that_is_none(monkeypatch, tmp_path):
    for folder, words in (("/no/such/home", "does not exist"), ("/proc", "cannot be written to")):
        monkeypatch.setenv("HOME", folder)
        bad(machine.home(), "blocker", f"{folder} {words}", "export HOME=FOLDER")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.home().level == "ok"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    bad(machine.home(), "blocker", "HOME is not set", "export HOME=FOLDER")


def test_a_user_without_a_name(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    bad(machine.user(), "warning", "user number 54321 has no name", "export USER=NAME")
    monkeypatch.setenv("USER", "robot")
    assert machine.user().found == "robot"


@pytest.mark.parametrize(
    ("environment", "level", "found"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "warning", "the locale is ANSI_X3.4-1968 and"),
        ({"PYTHONIOENCODING": "latin-1"}, "warning", "standard output is iso8859-1, not UTF-8"),
        ({"LC_ALL": "C", "PYTHONUTF8": "1"}, "ok", "UTF-8"),
    ],
)
def test_another_encoding(environment, level, found):
    code = "from libra_ray.doctor.machine import encoding as e; f = e(); print(f.level, f.found, f.fix, sep=chr(9))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    said = done.stdout.strip("\n").split("\t")
    assert said[0] == level
    assert said[1].startswith(found)
    assert said[2] == ("" if level == "ok" else "export PYTHONUTF8=1 LC_ALL=C.UTF-8")


@pytest.mark.parametrize(
    ("environment", "uri", "level", "found"),
    [
        ({}, "http://127.0.0.1:5000", "ok", "none"),
        (
            {"http_proxy": "http://me:secret@proxy:3128"},
            "",
            "warning",
            "127.0.0.1 and localhost, this machine, go to the proxy",
        ),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "localhost"}, "", "warning", "requests to 127.0.0.1, this machine"),
        ({"http_proxy": "http://proxy:3128"}, "http://127.0.0.1:5000", "blocker", "so tracking.uri is not reached"),
        ({"http_proxy": "http://proxy:3128"}, "http://mlflow.example:5000", "warning", "http_proxy"),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "localhost,127.0.0.1"}, "http://127.0.0.1:5000", "ok", "not for this"),
        ({"ALL_PROXY": "socks5://proxy:1080", "NO_PROXY": "*"}, "", "ok", "all_proxy"),
    ],
)
def test_proxies(monkeypatch, environment, uri, level, found):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = machine.proxies(uri)
    bad(finding, level, found, "" if level == "ok" else "export NO_PROXY=127.0.0.1,localhost")
    assert "secret" not in finding.found


def test_a_taken_port_names_its_owner():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        bad(machine.ports({port: "the gateways"}), "warning", f"{port} (the gateways) is taken by process {os.getpid()}", "end")
    assert machine.ports({port: "the gateways"}).level == "ok"
