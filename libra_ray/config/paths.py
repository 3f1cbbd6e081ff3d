"""Settings that name a place on disk: each is made absolute where it is given, for workers have other working folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLACES = ("data.root", "train.start_from", "train.stats_from", "evaluate.checkpoint", "delay.trace")
"""Always a folder or file; empty where there is none."""
NAMES_OR_FOLDERS = {"planner.backbone": "tiny", "refiner.encoder": "conv"}
"""Names, unless there is a folder of that name; and what is built in, which no folder changes."""


def place(text: str) -> Path:
    """A folder or file as it was typed; `~` is the home folder, also where a shell leaves it, as in `--runs=~/runs`.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text!r} is no place on disk: {error}") from None


def place_or_name(text: str) -> str:
    """The same of what may also be a name, or empty, as text."""
    return str(place(text)) if text.startswith("~") else text


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
