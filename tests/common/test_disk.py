"""Room on disks: refused before it is missing, and told as such in whichever library's words it is noticed."""

import errno
import sqlite3

import pytest
import torch

from libra_ray import checkpoint, shards
from libra_ray.common import disk
from libra_ray.common.disk import NoRoomError, check_room, lacks_room, room_for
from libra_ray.training.fit import Trainer
from tests.model.builders import make_batch, save_checkpoint, tiny_model

MORE_THAN_THERE_IS = 2**62


@pytest.fixture
def full(monkeypatch):
    monkeypatch.setattr(disk, "free", lambda folder: 1000)


def test_what_fits_passes(tmp_path):
    check_room(tmp_path / "not" / "yet" / "there", 1000, "a crumb")
    with room_for(tmp_path, 1000, "a crumb"):
        pass


def test_what_does_not_fit_is_refused_by_folder_need_and_room(tmp_path):
    with pytest.raises(
        NoRoomError, match=rf"no space left on the disk of {tmp_path}: 46\d+\.\d GB are needed for a cake, .*B are free"
    ):
        check_room(tmp_path, MORE_THAN_THERE_IS, "a cake")


def system(folder):
    raise OSError(errno.ENOSPC, "No space left on device")


def rust(folder):
    raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")


def database(folder):
    raise sqlite3.OperationalError("database or disk is full")


def wrapped(folder):
    try:
        system(folder)
    except OSError as error:
        raise RuntimeError("could not write") from error


@pytest.mark.parametrize("fails", [system, rust, database, wrapped])
def test_every_librarys_full_disk_is_known(fails, tmp_path):
    with pytest.raises(NoRoomError, match="0 kB are needed for a cake"), room_for(tmp_path, 10, "a cake"):
        fails(tmp_path)


def test_what_fails_on_a_full_disk_failed_for_want_of_room(tmp_path, full):
    with pytest.raises(NoRoomError), room_for(tmp_path, 10, "a cake"):
        raise RuntimeError("unexpected pos 64 vs 0")


def test_other_failures_are_left_alone(tmp_path):
    assert not lacks_room(FileNotFoundError(errno.ENOENT, "no such file"))
    with pytest.raises(RuntimeError, match="burnt"), room_for(tmp_path, 10, "a cake"):
        raise RuntimeError("burnt")


def test_a_checkpoint_without_room_leaves_the_one_before(tmp_path, full):
    model = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
        patch.setattr(disk, "free", lambda folder: 2**40)
        before = save_checkpoint(tmp_path / "saved", model, step=1)
    with pytest.raises(NoRoomError, match=rf"{tmp_path}/saved: \d.* are needed for a checkpoint"):
        save_checkpoint(tmp_path / "saved", model, step=2)
    assert checkpoint.read_manifest(tmp_path / "saved") == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_full_disk_is_known_by_what_an_error_came_from():
    with pytest.raises(RuntimeError, match="could not write") as caught:
        wrapped(None)
    assert lacks_room(caught.value)


@pytest.mark.parametrize("way", ["frozen", "lora", "full"])
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(way, tmp_path):
    trainer = Trainer(tiny_model({"planner.train_vision": way, "planner.train_language": way}), device=torch.device("cpu"))
    foretold = trainer.checkpoint_bytes()
    list(trainer.run([make_batch(trainer.model, 4)]))
    shards.begin(tmp_path / "saved", trainer.state()).finish(first=True)
    assert disk.bytes_below(tmp_path / "saved") == pytest.approx(foretold, rel=0.15)
