"""`jobs/doctor.py` as a user runs it: green on this machine, red with the fix where something is broken."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"(ok  |warn|FAIL)  (.{13}) \S.*|( {20})\S.*")


def doctor(*arguments, **environment):
    # Which ports are free, and where proxies lead, is this moment's.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and "proxy" not in name.lower()}
    return subprocess.run(
        [sys.executable, "jobs/doctor.py", *arguments],
        cwd=ROOT, env=kept | environment, capture_output=True, text=True, errors="replace", check=False, timeout=600,
    )  # fmt: skip


def test_this_machine_is_fit(tmp_path):
    # A short folder of its own: what clusters of other programs left behind is not this test's.
    with tempfile.TemporaryDirectory(prefix="lr", dir="/tmp") as short:
        done = doctor("debug", "--runs", str(tmp_path / "runs"), RAY_TMPDIR=short)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    *lines, last = done.stdout.splitlines()
    assert all(LINE.fullmatch(line) for line in lines), done.stdout
    names = [found[2].strip() for line in lines if (found := LINE.fullmatch(line)) and found[1]]
    assert len(names) == len(set(names)) == 16
    assert last.endswith((" 0 blockers: everything is well", " 0 blockers: jobs run"))
    assert not (tmp_path / "runs").exists(), "looking leaves nothing behind"


def test_a_broken_machine_is_red_and_says_the_fixes(tmp_path):
    (tmp_path / "empty").mkdir()
    done = doctor(
        "debug", "--runs", str(tmp_path / "runs"), "--data.root", str(tmp_path / "empty"),
        "--only", "home,ray address,data set,python",
        HOME="/no/such/home", RAY_ADDRESS="http://127.0.0.1:8265",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    for words in ("export HOME=FOLDER", "unset RAY_ADDRESS", "it has no meta/info.json"):
        assert words in done.stdout
    assert done.stdout.splitlines()[-1] == "1 ok, 1 warning, 2 blockers: jobs end over what FAIL says"


def test_names_that_the_terminal_cannot_show(tmp_path):
    folder = tmp_path / "données-数据"
    done = doctor("debug", "--only", "runs folder", "--runs", str(folder), PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "donn?es-??" in done.stdout
    assert done.stderr == ""


def test_a_check_that_is_not_there():
    done = doctor("--only", "hme")
    assert done.returncode == 2
    assert re.fullmatch(r"doctor.py: error: --only hme: no such check here; there are python, .*\n", done.stderr)
