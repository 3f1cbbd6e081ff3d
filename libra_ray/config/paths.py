"""Settings that name a place on disk: each is made absolute where it is given, for workers have other working folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLACES = ("data.root", "train.start_from", "train.stats_from", "evaluate.checkpoint", "delay.trace")
"""Always a folder or file; empty where there is none."""
NAMES_OR_FOLDERS = {"planner.backbone": "tiny", "refiner.encoder": "conv"}
"""Names, unless there is a folder of that name; and what is built in, which no folder changes."""


def in_full(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes of a configuration, with every folder and file in them as an absolute path; `~` is the home folder.

    Raises:
        ValueError: there is no such home folder, or nothing on disk can have such a name.
    """
    return {name: _in_full(name, value) for name, value in changes.items()}


def _in_full(name: str, value: Any) -> Any:
    if name not in (*PLACES, *NAMES_OR_FOLDERS) or not isinstance(value, str) or value in ("", NAMES_OR_FOLDERS.get(name)):
        return value
    try:
        path = Path(value).expanduser()
        return str(path.resolve()) if name in PLACES or path.is_dir() else value
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{name}={value!r} is no place on disk: {getattr(error, 'strerror', None) or error}") from None
