"""A disk without room is said in one line, before anything is lost: never by SIGBUS, never after hours."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from arguments import parse

from libra_ray.common import disk
from libra_ray.common.disk import NoRoomError, check_room, explained, reserve
from libra_ray.data import frames as frames_module
from libra_ray.data import spool
from libra_ray.data.dataset import open_dataset
from libra_ray.data.frames import frame_cache
from libra_ray.data.spool import save_episode
from tests.data.builders import make_episode, make_images

ROOT = Path(__file__).parents[2]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("full") / "demos"
    return open_dataset(make_images(root, {"observation.image": np.full((16, 16, 3), 7, np.uint8)}, lengths=(40, 40)))


def leave_free(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - free, free))


def raise_full(*_, **__):
    raise FULL


def test_room_is_asked_for_before_the_folder_is_there(tmp_path, monkeypatch):
    check_room(tmp_path / "not" / "yet", 1000, "pictures")
    leave_free(monkeypatch, 2_000_000)
    with pytest.raises(NoRoomError, match=r"disk of .*/yet: 3\.0 GB are needed for pictures, 2\.0 MB are free; make room"):
        check_room(tmp_path / "not" / "yet", 3 * 10**9, "pictures")


def test_reserved_room_is_taken_on_disk_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"beginning")
    reserve(path, 300_000, "pictures")
    assert path.stat().st_blocks * 512 >= 300_000
    assert path.read_bytes()[:9] == b"beginning"
    monkeypatch.setattr(os, "posix_fallocate", raise_full)
    with pytest.raises(NoRoomError, match="300 kB are needed for pictures"):
        reserve(path, 300_000, "pictures")
    assert not path.exists()


def test_every_full_disk_in_a_block_is_one_line_and_other_errors_stay(tmp_path):
    with pytest.raises(NoRoomError, match=rf"no space left on the disk of {tmp_path}, .* are free"), explained(tmp_path):
        raise FULL
    named = OSError(errno.EDQUOT, "quota", str(tmp_path / "sub" / "file"))
    with pytest.raises(NoRoomError, match=rf"{tmp_path}/sub,"), explained(Path("/")):
        raise named
    with pytest.raises(PermissionError), explained(tmp_path):
        raise PermissionError(errno.EACCES, "no")


OURS = "training failed: no space left on the disk of /runs: 3.0 GB are needed for a checkpoint, 2.0 MB are free"


def raise_ours():
    raise RuntimeError(OURS)


def raise_behind_another():
    try:
        raise_ours()
    except RuntimeError as error:
        raise ValueError("the task failed") from error


@pytest.mark.parametrize("fail", [raise_ours, raise_behind_another])
def test_a_line_that_says_so_already_is_the_line(tmp_path, fail):
    """Of another process it comes as the text of another error, or behind one."""
    with pytest.raises(NoRoomError) as said, explained(tmp_path):
        fail()
    assert str(said.value) == OURS


def test_a_job_ends_with_the_line(tmp_path, capsys):
    arguments = parse(["debug", "--runs", str(tmp_path)], "A job.", stage="train")
    with pytest.raises(SystemExit) as ended, arguments.refusing():
        raise FULL
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("train.py: error: no space left on the disk of")


def test_pictures_are_decoded_only_into_reserved_room(pictures, tmp_path, monkeypatch):
    seen = []

    def look(recorded, out):
        (partial,) = tmp_path.glob(".frames*.partial")
        seen.append(partial.stat().st_blocks * 512 - out.nbytes)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(frames_module, "_decode", look)
        with pytest.raises(KeyboardInterrupt):
            frame_cache(pictures, tmp_path, 64)
    assert seen[0] >= 0
    for spoil in (lambda: leave_free(patched, 9000), lambda: patched.setattr(os, "posix_fallocate", raise_full)):
        with monkeypatch.context() as patched:
            spoil()
            with pytest.raises(
                NoRoomError, match=r"983 kB are needed for the decoded pictures \(1 cameras, 80 frames of 64x64 pixels\)"
            ):
                frame_cache(pictures, tmp_path, 64)
        assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert (frame_cache(pictures, tmp_path, 64) == 7).all()


def test_on_a_disk_that_is_really_too_small(pictures, tmp_path):
    """As another process, in a mount of its own: what it died of was a signal."""
    body = f"""
        import sys
        from pathlib import Path
        from libra_ray.common import disk
        from libra_ray.data.dataset import open_dataset
        from libra_ray.data.frames import frame_cache
        if sys.argv[1] == "late":  # as if another process took the room in between
            import libra_ray.data.frames as frames
            frames.check_room = lambda *_: None
        try:
            frame_cache(open_dataset(Path({str(pictures.root)!r})), Path({str(tmp_path / "small")!r}), 64)
        except disk.NoRoomError as error:
            print(error)
    """
    (tmp_path / "small").mkdir()
    (tmp_path / "job.py").write_text(textwrap.dedent(body))
    mount = f"mount -t tmpfs -o size=500k none {tmp_path / 'small'}"
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*isolated, mount], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small disk of their own")
    for when in ("early", "late"):
        command = f"{mount} && {sys.executable} {tmp_path / 'job.py'} {when} && ls {tmp_path / 'small'}"
        done = subprocess.run(
            [*isolated, command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "983 kB are needed" in done.stdout
        assert ".npy" not in done.stdout


def test_a_recorded_episode_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(spool.np, "savez", raise_full)
    with pytest.raises(NoRoomError, match="no space left"):
        save_episode(tmp_path / "task" / "3.npz", make_episode())
    assert list((tmp_path / "task").iterdir()) == []


def test_sizes_in_words():
    assert [disk.size_text(size) for size in (900, 25_100_000, 3 * 10**9)] == ["1 kB", "25.1 MB", "3.0 GB"]
