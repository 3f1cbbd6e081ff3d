"""Which errors another try may mend, and what is said of the others."""

import errno
import traceback

import pytest
import torch
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from torch import distributed

from libra_ray.common.disk import NoRoomError
from libra_ray.on_ray import faults
from libra_ray.on_ray.faults import EndAtOnce, LastingError, ended, lasting_errors_logged, may_pass
from libra_ray.stats.intervals import wilson

PASSING = [
    ActorDiedError(),
    ObjectLostError("1" * 56, None, ""),
    OutOfMemoryError("the node ran low on memory"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError("no answer"),
    OSError(errno.ESTALE, "stale file handle"),
    distributed.DistBackendError("NCCL error: remote process exited"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:3489"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
]
LASTING = [
    ValueError("instructions are too long"),
    TypeError("no such argument"),
    KeyError("image"),
    FloatingPointError("the loss became nan"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    torch.OutOfMemoryError("CUDA out of memory"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    OSError(errno.ENOSPC, "No space left on device"),
    FileNotFoundError(errno.ENOENT, "no such file"),
    PermissionError(errno.EACCES, "not yours"),
    NoRoomError("no space left on the disk of here"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_was_lost_is_tried_again(error, tmp_path):
    assert may_pass(error)
    with pytest.raises(type(error)) as caught, lasting_errors_logged(tmp_path / "log", 0):
        raise error
    assert caught.value is error
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_would_come_again_is_not(error, tmp_path):
    assert not may_pass(error)
    assert not may_pass(RayTaskError("work", traceback.format_exc(), error))
    with pytest.raises(LastingError) as caught, lasting_errors_logged(tmp_path / "log", 1):
        raise error
    line = str(caught.value)
    assert "\n" not in line
    assert str(tmp_path) in line
    assert str(error).splitlines()[0] in line
    assert "--- worker 1\nTraceback (most recent call last):" in (tmp_path / "log").read_text()
    with pytest.raises(LastingError) as again:
        EndAtOnce().after_exception(None, {0: RuntimeError("Connection closed by peer"), 1: caught.value})
    assert ended(ControllerError(again.value), tmp_path / "log", 3) == line


def test_a_loss_alone_does_not_end_training():
    EndAtOnce().after_exception(None, dict(enumerate(PASSING)))


def test_the_place_is_named(tmp_path):
    words = r"ValueError: successes=5 must lie .*\(libra_ray/stats/intervals.py, line \d+\); the whole"
    with pytest.raises(LastingError, match=words), lasting_errors_logged(tmp_path / "log", 0):
        wilson(5, 4)


def test_too_many_losses_are_counted_and_the_last_one_is_named(tmp_path):
    error = WorkerGroupError("both gone", {1: ActorDiedError()})
    line = ended(error, tmp_path / "log", 3)
    assert line.startswith("training was restarted 3 times (ray.max_failures) and failed again; worker 1: ActorDiedError: ")
    assert "both gone" in (tmp_path / "log").read_text()


def test_a_full_disk_is_named_even_where_no_log_can_be_written(tmp_path):
    line = ended(ControllerError(OSError(errno.ENOSPC, "No space left on device")), tmp_path / "nowhere" / "log", 3)
    assert line.startswith(f"no space left on the disk of {tmp_path / 'nowhere'}, ")
    assert "traceback" not in line


def test_the_line_survives_the_way_to_the_driver():
    from ray import cloudpickle

    assert str(cloudpickle.loads(cloudpickle.dumps(faults.LastingError("gone")))) == "gone"
