"""A folder is there whole, in one version or the other, whoever is killed at whatever moment; and nothing is left for ever."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from libra_ray.common import folders
from libra_ray.common.folders import replace_folder, tidy, written

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, os, shutil, signal, sys
from pathlib import Path
from libra_ray.common import folders

TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "fcntl.flock")
place, exchanges = Path(sys.argv[1]), sys.argv[2] == "exchanges"
target = place / "kept [1]"
if not exchanges:
    folders._exchanged = lambda *_: False


def write(word):
    with folders.written(target) as staging:
        staging.mkdir()
        for name in "ab":
            (staging / name).write_text(word)


def killed_before(step):
    child = os.fork()
    if not child:
        left = step

        def count(event, _):
            nonlocal left
            if event in TOUCHES:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        write("new")
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def version():
    return "".join(path.read_text() for path in sorted(target.iterdir())) if target.exists() else "none"


found = []
while not found or found[-1]["killed"]:
    shutil.rmtree(place, ignore_errors=True)
    if len(sys.argv) == 3:
        write("old")
    row = {"killed": killed_before(len(found)), "at once": version()}
    folders.tidy(target)
    row |= {"tidied": version(), "left": sorted(path.name for path in place.iterdir()) if place.exists() else []}
    write("last")
    found.append(row | {"next": version(), "beside": [path.name for path in place.iterdir()]})
print(json.dumps(found))
"""
OLD, NEW, LAST = "oldold", "newnew", "lastlast"


def killed_at_every_step(place, *argv):
    """What was there after a real SIGKILL before each step that touches the disk, and after none."""
    command = [sys.executable, "-c", PROGRAM, str(place), *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def able(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    if not folders._exchanged(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot exchange two folders")


def test_at_every_moment_one_version_is_whole_and_in_its_place(able, tmp_path):
    rows = killed_at_every_step(tmp_path / "runs", "exchanges")
    assert len(rows) > 8
    assert [row["killed"] for row in rows] == [True] * (len(rows) - 1) + [False]
    seen = [row["at once"] for row in rows]
    assert seen == [OLD] * seen.count(OLD) + [NEW] * seen.count(NEW)
    assert {*seen} == {OLD, NEW}


@pytest.mark.parametrize("way", ["exchanges", "renames"])
def test_the_next_one_finds_a_whole_version_and_leaves_nothing_else(way, tmp_path):
    rows = killed_at_every_step(tmp_path / "runs", way)
    assert {row["tidied"] for row in rows} == {OLD, NEW}
    assert way == "exchanges" or "none" in {row["at once"] for row in rows}, "killed between both renames too"
    assert all(row["left"] == ["kept [1]"] == row["beside"] and row["next"] == LAST for row in rows)


def test_what_was_not_there_before_is_there_whole_or_not_at_all(tmp_path):
    rows = killed_at_every_step(tmp_path / "runs", "renames", "new")
    assert {(row["at once"], row["tidied"]) for row in rows} == {("none", "none"), (NEW, NEW)}
    assert all(row["left"] in ([], ["kept [1]"]) and row["beside"] == ["kept [1]"] for row in rows)


def test_what_the_living_write_is_left_alone(tmp_path):
    target = tmp_path / "kept"
    with written(target) as slow:
        slow.mkdir()
        tidy(target)
        with written(target) as fast:
            fast.mkdir()
            (fast / "fast").touch()
        assert [path.name for path in target.iterdir()] == ["fast"]
        (slow / "slow").touch()
    assert [path.name for path in target.iterdir()] == ["slow"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_that_fails_leaves_the_old_version(tmp_path):
    target = tmp_path / "kept"
    (target / "old").mkdir(parents=True)
    with pytest.raises(FileNotFoundError), written(target):
        (tmp_path / "nowhere").rmdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "old"]


def test_a_version_that_cannot_be_put_in_place_takes_no_other_away(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_exchanged", lambda *_: False)
    (tmp_path / "kept" / "old").mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "nowhere", tmp_path / "kept")
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "old"]


def test_where_nothing_is_there_is_nothing_to_tidy(tmp_path):
    tidy(tmp_path / "not" / "yet" / "kept")
    assert list(tmp_path.iterdir()) == []
