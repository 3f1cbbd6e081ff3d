"""README and docs stay true: their commands exist, their tables are the committed results, their links lead somewhere."""

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from arguments import parse

from benchmarks import results_table, serving_pages

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST_README = 900
CODE_LINES = [line.strip() for line in README.splitlines() if line.startswith("    ")]


def test_the_readme_is_a_map() -> None:
    assert len(README.split()) <= LONGEST_README


def test_the_tables_are_the_committed_results() -> None:
    shown = results_table.read_between(ROOT / "README.md", "results_table.py")
    assert shown == results_table.summary()
    assert "`quickstart`" in shown
    whole = results_table.read_between(ROOT / "docs" / "results.md", "results_table.py")
    assert whole == results_table.document()
    assert "button-press-topdown-v3" in whole


def test_the_comparison_of_servers_is_the_committed_one() -> None:
    result = json.loads((results_table.RESULTS / "serving.json").read_text())
    assert results_table.read_between(ROOT / "README.md", "serving.py") == serving_pages.for_readme(result)


def test_every_make_target_exists() -> None:
    targets = {match for line in CODE_LINES + re.findall(r"`([^`]+)`", README) for match in re.findall(r"^make (\S+)", line)}
    assert {"quickstart", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("line", [line for line in CODE_LINES if line.startswith("uv run jobs/")])
def test_every_job_line_is_accepted(line: str) -> None:
    _, _, script, *argv = shlex.split(line, comments=True)
    assert (ROOT / script).is_file()
    job = importlib.import_module(Path(script).stem)
    assert parse(argv, "", stage=Path(script).stem, more=getattr(job, "OPTIONS", {})).config


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith(("https://", "#")) or (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_of_the_machine_is_shown(page: Path) -> None:
    assert not re.search(r"/work/|/tmp/|/root/|pythonhosted", page.read_text(encoding="utf-8"))
