"""The lines that README and docs print for a terminal."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_COMMANDS = ("make ", "uv run ", "export ", "curl ", "RAY_ADDRESS=")
_FENCE = re.compile(r"^```")


@dataclass(frozen=True, kw_only=True)
class Printed:
    """A line as a reader would paste it: continuation lines joined, the comment behind it taken off."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """As a shell splits it."""
        return shlex.split(self.line)


def printed_lines() -> list[Printed]:
    """All of them, in the order of pages and lines; a line that several pages print comes once."""
    found: dict[str, Printed] = {}
    for page in PAGES:
        for line in _commands(page.read_text(encoding="utf-8")):
            found.setdefault(line, Printed(page=page.name, line=line))
    return list(found.values())


def _commands(text: str) -> Iterator[str]:
    """Indented lines that begin with a command, and those of fenced blocks."""
    fenced, held = False, ""
    for raw in text.splitlines():
        if _FENCE.match(raw):
            fenced = not fenced
            continue
        if not (held or fenced or raw.startswith("    ")):
            continue
        line = held + raw.strip()
        if line.endswith("\\"):
            held = line[:-1]
            continue
        held = ""
        if line.startswith(_COMMANDS):
            yield re.sub(r"\s+#\s.*$", "", line)
