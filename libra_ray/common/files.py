"""Files that are there whole or not at all, and logs of JSON rows that may end in the middle of one."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from libra_ray.common.json_text import parse


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows in one write and flush them to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def read_jsonl[T](path: Path, kind: type[T]) -> list[T]:
    """All whole rows of a file that may end in the middle of one (a process was killed while writing it).

    Args:
        path: need not exist.
        kind: what every row is.

    Raises:
        ValueError: a row is something else; names the file, the line and the field.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [parse(kind, line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=1) if line]


def repair_jsonl(path: Path) -> None:
    """Cut off a last row that a killed process left unfinished, so that the next one does not continue it."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
