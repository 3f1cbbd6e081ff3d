"""Room on disks: asked for before it is needed, and named where it is missing."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ("no space left on", "disk is full", "disk quota exceeded")
"""How libraries say it that hide the system's number: safetensors, pyarrow, SQLite."""
_NOTHING = 2**20
"""Bytes below which a disk counts as full: whatever failed while it was written did so for want of them."""


class NoRoomError(OSError):
    """A disk is full, or would be."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(number, text)

    def __str__(self) -> str:
        return str(self.strerror)


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuse what will not fit.

    Args:
        folder: where to; it need not exist yet.
        needed: bytes.
        what: will be written, in words.

    Raises:
        NoRoomError: the disk of `folder` has less room than that; the text says both.
    """
    if needed > free(folder):
        raise _error(folder, needed, what)


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
            raise _error(folder, needed, what) from error
        raise


def lacks_room(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that of a full disk, in whichever library's words."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if getattr(error, "errno", None) in _ERRNOS or any(words in str(error).lower() for words in _WORDS):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def free(folder: Path) -> int:
    """Bytes that are free on the disk of `folder`, or of the nearest folder above it that exists."""
    return shutil.disk_usage(next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())).free


def bytes_below(folder: Path) -> int:
    """The size of all files below a folder, 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def megabytes(number: int) -> str:
    """A number of bytes for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _error(folder: Path, needed: int, what: str) -> NoRoomError:
    return NoRoomError(
        errno.ENOSPC,
        f"no space left on the disk of {folder}: {what} needs {megabytes(needed)}, {megabytes(free(folder))} are free; "
        "make room and run the same command again",
    )
