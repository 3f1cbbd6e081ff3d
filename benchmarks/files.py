"""Where results are, how they are written, and where they come from."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from libra_ray.common.files import write_text
from libra_ray.common.json_text import plain, read
from libra_ray.common.provenance import describe_hardware, git_revision
from libra_ray.types import Json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs"
"""What git ignores: the work, and what a stopped benchmark goes on with."""


def origin() -> Json:
    """Machine and revision, with `-dirty` where code differs from it: part of every result."""
    return {"hardware": plain(describe_hardware()), "git_revision": git_revision()}


def read_result(path: Path) -> Json:
    """The result at `path`."""
    tree: Json = json.loads(path.read_text(encoding="utf-8"))
    return tree


class Measured(Protocol):
    """A result whose cells share settings."""

    @property
    def settings(self) -> Json:
        """What they were all measured with."""


def earlier[Study: Measured](out: Path, kind: type[Study], settings: Json) -> Study | None:
    """An earlier result of the same settings, to go on with; None where there is none.

    Raises:
        ValueError: it has others.
    """
    if not out.exists():
        return None
    found = read(kind, out)
    if found.settings != settings:
        raise ValueError(f"{out} was measured with {found.settings}, not {settings}; give the same, or another --out")
    return found


def write_result(path: Path, result: Any) -> None:
    """Write a result, a record or a tree, as strict JSON, whole or not at all.

    A cell or row is a line, so that a changed one is a changed line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(_lines(plain(result))) + "\n")


def command_line(name: str, doc: str | None, **more: Any) -> argparse.ArgumentParser:
    """The parser of the benchmark `name`, which says what its module's docstring says."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc, formatter_class=layout, **more)


def _lines(tree: Mapping[str, Any]) -> Iterator[str]:
    """One a key, or where a key holds several lists or mappings, one for each of them."""
    yield "{"
    for number, (key, value) in enumerate(tree.items(), 1):
        comma = "," if number < len(tree) else ""
        items = list(value.values()) if isinstance(value, Mapping) else value
        if isinstance(items, list) and items and all(isinstance(item, list | Mapping) for item in items):
            names = [f"{_text(name)}: " for name in value] if isinstance(value, Mapping) else [""] * len(items)
            begin, end = "{}" if isinstance(value, Mapping) else "[]"
            yield f"{_text(key)}: {begin}"
            whole = [f"{name}{_text(item)}" for name, item in zip(names, items, strict=True)]
            yield from (f"{line}," for line in whole[:-1])
            yield whole[-1]
            yield f"{end}{comma}"
        else:
            yield f"{_text(key)}: {_text(value)}{comma}"
    yield "}"


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
