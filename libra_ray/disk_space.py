"""Room on disk: asked for before much is written, reserved for files that are filled later, and told from other errors."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class NoRoomError(RuntimeError):
    """A disk without the room for what shall be written; the message names the folder, what is needed and what is free."""


def require_room(folder: Path, size: int, what: str) -> None:
    """Refuse to begin where the disk of `folder` has less than `size` bytes free.

    Args:
        folder: where to write; it, or a part of its path, exists.
        size: bytes that are needed.
        what: what they are for, e.g. `the decoded pictures`.

    Raises:
        NoRoomError: there is less.
    """
    if free_bytes(folder) < size:
        raise _too_little(folder, size, what)


def reserve(path: Path, size: int, what: str) -> None:
    """Give the existing file `path` its `size` bytes on disk, so that filling it through a memory map cannot fail.

    A page of a memory map that finds no room on disk ends the whole process by SIGBUS, without a word. Where the file system
    cannot reserve, the file stays as it is.

    Raises:
        NoRoomError: the disk has not so much room; `path` is removed.
    """
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return
        with suppress(OSError):
            path.unlink()
        if error.errno not in _FULL:
            raise
        raise _too_little(path.parent, size, what) from error


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say in one line, instead of in the words of whoever was writing, that a disk has become full in this block.

    Args:
        folder: what is named where the error itself names no file.

    Raises:
        NoRoomError: instead of an `OSError` of a full disk or an exhausted quota.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        place = Path(os.fsdecode(error.filename)).parent if isinstance(error.filename, str | bytes) else folder
        raise NoRoomError(
            f"no space left on the disk of {place} ({words(free_bytes(place))} are free now); "
            "free some, and run the same command again"
        ) from error


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write on the disk of `folder`, which need not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def words(size: int) -> str:
    """Bytes as people read them, e.g. `25.1 MB`."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1000:.0f} kB"


def _too_little(folder: Path, size: int, what: str) -> NoRoomError:
    return NoRoomError(
        f"{what} need {words(size)} on the disk of {folder}, {words(free_bytes(folder))} are free; "
        "free some, and run the same command again, or give a folder on another disk"
    )
