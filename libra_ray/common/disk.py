"""Room on disks: asked for before it is needed, reserved for files that are filled later, and named where it is missing."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_WORDS = ("no space left on", "disk is full", "disk quota exceeded")
"""How libraries say it that hide the system's number: safetensors, pyarrow, SQLite."""
_OURS = "no space left on the disk of "
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_NOTHING = 2**20
"""Bytes below which a disk counts as full: whatever failed while it was written did so for want of them."""


class NoRoomError(RuntimeError):
    """A disk is full, or would be; the message names the folder, what is needed and what is free."""


class DeniedError(RuntimeError):
    """This user may not read or write a file; the message names it."""


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuse what will not fit.

    Args:
        folder: where to; it need not exist yet.
        needed: bytes.
        what: they are for, e.g. `the decoded pictures`.

    Raises:
        NoRoomError: the disk of `folder` has less room than that.
    """
    if needed > free(folder):
        raise _too_little(folder, needed, what)


@contextmanager
def room_for(folder: Path, needed: int, what: str) -> Iterator[None]:
    """`check_room`, and whatever the block fails with on a full disk becomes the same error.

    Raises:
        NoRoomError: see `check_room`.
    """
    check_room(folder, needed, what)
    try:
        yield
    except Exception as error:
        if lacks_room(error) or free(folder) < _NOTHING:
            raise _too_little(folder, needed, what) from error
        raise


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say in one line, instead of in the words of whoever was at it, that a disk has become full or a file was denied here.

    Args:
        folder: what is named where the error itself names no file.

    Raises:
        NoRoomError: instead of the error of a full disk or an exhausted quota.
        DeniedError: instead of the error of missing leave, or of a disk that is not to be written.
    """
    try:
        yield
    except (NoRoomError, DeniedError):
        raise
    except Exception as error:
        if not lacks_room(error):
            if isinstance(error, OSError) and error.errno in _DENIED and error.filename is not None:
                file, why = os.fsdecode(error.filename), error.strerror
                raise DeniedError(
                    f"{file} cannot be read or written ({why}); give another place, or leave to this one"
                ) from error
            raise
        if said := next((str(cause) for cause in _causes(error) if _OURS in str(cause)), ""):
            # Of another process, or wrapped by whoever was told.
            raise NoRoomError(said) from error
        name = getattr(error, "filename", None)
        place = Path(os.fsdecode(name)).parent if isinstance(name, str | bytes) else folder.absolute()
        raise NoRoomError(
            f"{_OURS}{place}, {size_text(free(place))} are free; make room and run the same command again ({error})"
        ) from error


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


def lacks_room(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that of a full disk, in whichever library's words."""
    return any(
        getattr(cause, "errno", None) in _FULL or any(words in str(cause).lower() for words in _WORDS)
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def free(folder: Path) -> int:
    """Bytes that an ordinary user may still write on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())).free


def bytes_below(folder: Path) -> int:
    """The size of all files below a folder, 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size_text(size: int) -> str:
    """Bytes as people read them, e.g. `25.1 MB`."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1000:.0f} kB"


def _too_little(folder: Path, needed: int, what: str) -> NoRoomError:
    return NoRoomError(
        f"{_OURS}{folder}: {size_text(needed)} are needed for {what}, "
        f"{size_text(free(folder))} are free; make room and run the same command again"
    )
