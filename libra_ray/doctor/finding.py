"""What one check found, and how it is shown."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Self

Level = Literal["ok", "warning", "blocker"]
MARKS: dict[Level, str] = {"ok": "ok", "warning": "warn", "blocker": "FAIL"}
COLOURS: dict[Level, int] = {"ok": 32, "warning": 33, "blocker": 31}
NAME_WIDTH = 13
LIMIT_OF_TEXT = 400
AT_A_TIME = 2


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor.

    Attributes:
        level: a `blocker` stops a job, a `warning` may.
        found: what there is.
        fix: what to do or type; empty where nothing is wrong.
    """

    level: Level
    found: str
    fix: str = ""

    @classmethod
    def ok(cls, found: str) -> Self:
        """All is well."""
        return cls(level="ok", found=found)

    @classmethod
    def warning(cls, found: str, fix: str = "") -> Self:
        """Jobs run, but not all, or not well."""
        return cls(level="warning", found=found, fix=fix)

    @classmethod
    def blocker(cls, found: str, fix: str) -> Self:
        """A job ends over it."""
        return cls(level="blocker", found=found, fix=fix)

    @classmethod
    def refused(cls, error: Exception, fix: str, level: Level = "blocker") -> Self:
        """What an error of this package says: what is wrong, and behind its last semicolon the remedy, or else `fix`."""
        text = " ".join(str(error).split())
        found, _, remedy = text.rpartition("; ")
        return cls(level=level, found=found or remedy, fix=remedy if found else fix)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One look at the machine.

    Attributes:
        look: returns what there is, in words where all is well; it may find several things of one kind. Its ValueError or
            RuntimeError is a blocker.
        fix: of an error that names no remedy.
    """

    look: Callable[[], str | Finding | Iterable[Finding]]
    fix: str = "mend what is named, or report it"


def chosen(checks: Mapping[str, Check], only: str) -> dict[str, Check]:
    """The checks named in `only`, with commas between; all of them where it is empty.

    Raises:
        ValueError: a check that is not among them.
    """
    names = [name.strip() for name in only.split(",") if name.strip()] or list(checks)
    if unknown := [name for name in names if name not in checks]:
        raise ValueError(f"--only {', '.join(unknown)}: no such check here; there are {', '.join(checks)}")
    return {name: checks[name] for name in names}


def examined(checks: Mapping[str, Check]) -> Iterator[tuple[str, Finding]]:
    """What the checks find, by name and in their order, each as soon as it is known; one that raises is a blocker."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for name, findings in zip(checks, pool.map(outcome, checks.values()), strict=True):
            yield from ((name, finding) for finding in findings)


def outcome(check: Check) -> list[Finding]:
    """What one check finds."""
    try:
        found = check.look()
        if isinstance(found, str):
            return [Finding.ok(found)]
        return [found] if isinstance(found, Finding) else list(found)
    except (ValueError, RuntimeError) as error:
        return [Finding.refused(error, check.fix)]
    except Exception as error:  # noqa: BLE001  (the border of one check: the others go on)
        return [Finding.blocker(f"this check failed itself: {type(error).__name__}: {error}", check.fix)]


def page(name: str, finding: Finding, *, colour: bool = False, width: int = 0) -> str:
    """One line and, where there is one, the fix below it.

    Args:
        name: what was looked at.
        finding: what was found.
        colour: mark the level in its colour.
        width: columns of the terminal that lines are broken at; 0 breaks none.
    """
    mark = f"{MARKS[finding.level]:5}"
    if colour:
        mark = f"\x1b[{COLOURS[finding.level]}m{mark}\x1b[0m"
    margin = " " * (5 + NAME_WIDTH + 2)
    rows = _broken(finding.found, width, margin)
    if finding.fix:
        rows += _broken(f"fix: {finding.fix}", width, margin)
    return "\n".join([f"{mark} {name:{NAME_WIDTH}} {rows[0]}", *(margin + row for row in rows[1:])])


def summary(findings: Iterable[Finding], *, colour: bool = False) -> str:
    """The last line: how many of each, and what follows."""
    levels = [finding.level for finding in findings]
    blockers, warnings = levels.count("blocker"), levels.count("warning")
    worst: Level = "blocker" if blockers else "warning" if warnings else "ok"
    verdict = {"ok": "everything is well", "warning": "jobs run", "blocker": "jobs end over what FAIL says"}[worst]
    text = f"{levels.count('ok')} ok, {_counted(warnings, 'warning')}, {_counted(blockers, 'blocker')}: {verdict}"
    return f"\x1b[{COLOURS[worst]}m{text}\x1b[0m" if colour else text


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _broken(text: str, width: int, margin: str) -> list[str]:
    line = " ".join(text.split())
    line = line if len(line) <= LIMIT_OF_TEXT else f"{line[: LIMIT_OF_TEXT - 3]}..."
    if width <= len(margin) + 20:
        return [line]
    return textwrap.wrap(line, width - len(margin), break_long_words=False, break_on_hyphens=False) or [""]
