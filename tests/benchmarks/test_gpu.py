"""A cut run keeps what it measured: rows fail and end for themselves, and each is on disk before the next begins."""

import json
import sys
from itertools import count

import pytest

from benchmarks import gpu
from benchmarks.time_limit import at_most


def endless():
    for _ in count():
        pass


def broken():
    raise RuntimeError("CUDA out\nof memory")


def test_what_takes_too_long_is_ended_and_nothing_else():
    with pytest.raises(TimeoutError, match=r"^not done after 0 s$"), at_most(0.05):
        endless()
    with at_most(1e4):
        done = True
    assert done


def test_every_row_is_written_before_the_next_one_and_the_table_comes_last(tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "gpu.json", []

    def rows(given):
        for name, row in (("good", lambda: {"step_ms": 1.5}), ("broken", broken), ("long", endless), ("late", endless)):
            seen.append(list(json.loads(out.read_text())["rows"]) if out.exists() else [])
            yield name, row

    monkeypatch.setattr(gpu, "rows_of", rows)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), "--row-limit", "0.1", "--limit", "0.15"])
    clock = iter([0.0, 0.01, 0.02, 0.03, 0.2])
    monkeypatch.setattr(gpu, "now", lambda: next(clock))
    gpu.main()
    assert seen == [[], ["good"], ["good", "broken"], ["good", "broken", "long"]]
    found = json.loads(out.read_text())["rows"]
    assert found["good"]["step_ms"] == 1.5
    assert [found[name]["error"] for name in ("broken", "long", "late")] == [
        "RuntimeError: CUDA out of memory",
        "TimeoutError: not done after 0 s",
        "not begun: 0 s were over",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["good", "broken", "long", "late"]


def test_all_parts_have_rows(monkeypatch):
    """Of the shapes that a CPU has room for; none of them is measured here."""
    monkeypatch.setattr(sys, "argv", ["gpu", "--scale", "tiny", "--times", "3"])
    rows = dict(gpu.rows_of(gpu.arguments()))
    assert {name.split(",")[0] for name in rows} == {"train quickstart", "train tiny", "answer tiny"}
    row = next(row for name, row in rows.items() if name == "answer tiny, planner, 1 robots, fp32, none")
    assert row()["p50_ms"] > 0
