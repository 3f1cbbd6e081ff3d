"""The benchmarks as a package: each says what it takes, and what they have written is compact, dated and shown somewhere."""

import importlib
import re
import subprocess
import sys

import pytest

from benchmarks.files import RESULTS, ROOT, origin, read_result, write_result
from benchmarks.results_table import MEASURED

SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))
RUN = [path.stem for path in SOURCES if path.parent.name == "benchmarks" and "__main__" in path.read_text(encoding="utf-8")]
COMMITTED = sorted(RESULTS.glob("*.json"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TREE = {
    "name": "one",
    "none": [],
    "numbers": [1, 2],
    "one": {"a": 1, "b": {"c": [2, float("nan")]}},
    "rows": [{"a": 1}, {"a": 2}, {"a": 3}],
    "cells": {"x|1": {"y": [1, 2]}, "x|2": {"y": []}},
}
TEXT = """{
"name": "one",
"none": [],
"numbers": [1, 2],
"one": {"a": 1, "b": {"c": [2, null]}},
"rows": [
{"a": 1},
{"a": 2},
{"a": 3}
],
"cells": {
"x|1": {"y": [1, 2]},
"x|2": {"y": []}
}
}
"""


@pytest.mark.parametrize("name", RUN)
def test_a_benchmark_says_what_it_takes(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m benchmarks.{name} ")
    assert module.__doc__.splitlines()[0] in shown


def test_a_benchmark_is_run_as_a_module():
    assert len(RUN) >= 10
    command = [sys.executable, "-m", "benchmarks.results_table", "--help"]
    assert "runs/quickstart" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_printed_command_is_a_module_of_the_package(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?:uv run|python) benchmarks/", text)
    for module in re.findall(r"-m benchmarks\.([a-z_.]+)", text):
        assert (ROOT / "benchmarks" / f"{module.replace('.', '/')}.py").is_file(), module


def test_a_result_is_one_cell_a_line(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_result(path, TREE)
    assert path.read_text() == TEXT
    TREE["one"]["b"]["c"][1] = None
    assert read_result(path) == TREE
    assert list(read_result(path)) == list(TREE)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_result_is_compact_dated_and_shown(path, tmp_path):
    found = read_result(path)
    write_result(tmp_path / path.name, found)
    assert path.read_text(encoding="utf-8") == (tmp_path / path.name).read_text(encoding="utf-8")
    assert origin().keys() <= found.keys()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["git_revision"])
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    by_script = {*MEASURED, *(f"baseline_{preset}" for preset in MEASURED), "components", "granularity"}
    assert path.stem in by_script or f"benchmarks/results/{path.stem}." in pages


def test_beside_results_there_are_only_their_tables_and_plots():
    stems = {path.stem for path in COMMITTED}
    # A study of several tables has a plot of each.
    plots = {path for path in RESULTS.glob("systems_*_*.svg") if path.stem.rpartition("_")[0] in stems}
    assert {path.name for path in RESULTS.iterdir() if path.is_dir() or path.stem not in stems} == {p.name for p in plots}
    assert {path.suffix for path in RESULTS.iterdir()} <= {".json", ".md", ".svg"}
