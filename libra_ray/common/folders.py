"""Folders that are there whole or not at all, whoever is killed while writing them."""

import ctypes
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

_HERE, _EXCHANGE = -100, 2
"""Linux: AT_FDCWD and RENAME_EXCHANGE."""
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
"""What systems say, and file systems of networks, that cannot exchange two folders."""
_NEW, _OLD, _LOCK = ".new-", ".old", ".lock"


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """A place beside `target` for a new version of that folder, which the block has to make there.

    It takes the place of `target` when the block ends; if that fails, nothing of it is left. What killed processes left of
    theirs is tidied first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    tidy(target)
    staging = target.with_name(f".{target.name}{_NEW}{uuid.uuid4().hex[:8]}")
    lock = staging.with_name(staging.name + _LOCK)
    with lock.open("w", encoding="utf-8") as file:
        # Held for as long as this process lives: whoever gets it knows that nobody writes here any more.
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield staging
            replace_folder(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            lock.unlink(missing_ok=True)


def replace_folder(staging: Path, target: Path) -> None:
    """Put the folder `staging` in the place of `target`, whose former version is removed.

    At every moment one of both versions is whole, and where the file system can exchange two folders also in its place.
    Elsewhere a process that is killed may leave none there; `tidy` puts the former one back.
    """
    if not target.exists():
        staging.replace(target)
        return
    if _exchanged(staging, target):
        shutil.rmtree(staging, ignore_errors=True)
        return
    old = staging.with_name(staging.name + _OLD)
    target.replace(old)
    try:
        staging.replace(target)
    except OSError:
        old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def tidy(target: Path) -> None:
    """Put back a version of `target` that a killed process took away, and remove what such processes left beside it.

    What a living process writes there is left alone.
    """
    for lock in target.parent.glob(f".{escape(target.name)}{_NEW}*{_LOCK}"):
        # One that is gone, or held, is the business of another process.
        with suppress(OSError), lock.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            staging = lock.with_name(lock.name.removesuffix(_LOCK))
            old = staging.with_name(staging.name + _OLD)
            if old.exists() and not target.exists():
                old.replace(target)
            for left in (staging, old):
                shutil.rmtree(left, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where that cannot be done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
