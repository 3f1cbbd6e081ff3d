"""Who started whom, from /proc: what a test has to know of processes that it did not start itself."""

import time
from collections.abc import Collection
from pathlib import Path


def family(pid: int) -> list[int]:
    """All processes below `pid`, children first."""
    parents = {int(stat.parent.name): parent for stat in Path("/proc").glob("[0-9]*/stat") if (parent := _parent(stat))}
    below, found = [pid], []
    while below:
        below = [child for child, parent in parents.items() if parent in below]
        found += below
    return found


def command(pid: int) -> str:
    """The command line of a process, empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def loaded(pid: int, library: str) -> bool:
    """Whether a process has a shared library of that name in its memory."""
    return library in Path(f"/proc/{pid}/maps").read_text()


def survivors(pids: Collection[int], patience_s: float = 30) -> list[int]:
    """Those that have not ended within `patience_s`; a zombie has ended."""
    deadline = time.monotonic() + patience_s
    left = list(pids)
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if _parent(Path(f"/proc/{pid}/stat")) is not None]
        time.sleep(0.1)
    return left


def _parent(stat: Path) -> int | None:
    """The parent's number; None for one that has ended."""
    try:
        state, parent = stat.read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)
