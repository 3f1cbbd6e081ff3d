"""Errors of workers: one that would come again with the same input ends the job at once, in one line; a loss is tried again."""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ray.exceptions import RayError, RayTaskError
from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError
from torch import distributed

from libra_ray.common.disk import NoRoomError, free, lacks_room, size_text

PACKAGE = Path(__file__).parents[1]
_OUT_OF_REACH = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH}
"""What the system says of a shared folder whose machine is away."""
_OF_A_PEER = ("gloo", "connection closed by peer", "connection reset by peer")
"""What the other workers' exchange says, as a plain RuntimeError, when one of them is gone."""


class LastingError(RuntimeError):
    """An error that would come again; its text is the line to show."""


class EndAtOnce(UserCallback):
    """Ends a training run at its first `LastingError`: Ray Train restarts workers after whatever they raise."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Asked in Ray Train's controller, for which an error of its callback is the end."""
        for error in worker_exceptions.values():
            if isinstance(error, LastingError):
                raise error


@contextmanager
def lasting_errors_logged(log: Path, rank: int) -> Iterator[None]:
    """The border of one worker: what another try cannot mend leaves as a `LastingError`, its traceback in `log`.

    Raises:
        LastingError: see `may_pass`.
    """
    try:
        yield
    except Exception as error:
        if may_pass(error):
            raise
        raise LastingError(_ended_by(error, log, f"worker {rank}")) from error


def may_pass(error: BaseException) -> bool:
    """Whether another try may mend it: a process, a machine or a connection was lost."""
    if isinstance(error, RayTaskError):
        return may_pass(error.cause)
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return error.errno in _OUT_OF_REACH
    if isinstance(error, torch.AcceleratorError):
        # The device's own faults; but an index out of range on it is ours.
        return "device-side assert" not in str(error)
    lost = isinstance(error, RayError | ConnectionError | TimeoutError | distributed.DistError)
    return lost or (isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OF_A_PEER))


def line(error: BaseException) -> str:
    """What, and where, in one line."""
    if isinstance(error, LastingError | NoRoomError):
        return str(error)
    first = next(iter(str(error).strip().splitlines()), "")
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if PACKAGE in Path(f.filename).parents and f.filename != __file__]
    where = f" ({Path(ours[-1].filename).relative_to(PACKAGE.parent)}, line {ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {first}{where}"


def ended(error: TrainingFailedError, log: Path, max_failures: int) -> str:
    """The line that says how training ended."""
    match error:
        case ControllerError(controller_failure=LastingError() as lasting):
            return str(lasting)
        case ControllerError(controller_failure=failure):
            return _ended_by(failure, log, "controller")
        case WorkerGroupError(worker_failures=failures) if failures:
            rank, failure = next(iter(failures.items()))
            return (
                f"training was restarted {max_failures} times (ray.max_failures) and failed again; worker {rank}: "
                f"{line(failure)}{_kept(log, f'worker {rank}', error)}"
            )
        case _:
            return _ended_by(error, log, "training")


def _ended_by(error: BaseException, log: Path, whose: str) -> str:
    if lacks_room(error) and not isinstance(error, NoRoomError):
        full = f"no space left on the disk of {log.parent}, {size_text(free(log.parent))} are free; make room and run again"
        return f"{full} ({line(error)}){_kept(log, whose, error)}"
    return f"training failed: {line(error)}{_kept(log, whose, error)}"


def _kept(log: Path, whose: str, error: BaseException) -> str:
    """Where the whole traceback is to be found; nowhere, where not even that can be written."""
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"--- {whose}\n{''.join(traceback.format_exception(error))}\n")
    except OSError:
        return ""
    return f"; the whole traceback is in {log}"
