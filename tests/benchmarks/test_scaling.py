"""The benchmark of recording and evaluation over the cores: what it asks for, and what it prints last."""

import json
import sys

import pytest

from benchmarks import scaling


def _row(given, cpus, work):
    steps = {"record": 100.0 * cpus, "evaluate": 50.0 * cpus**2}
    wall_s = dict.fromkeys(scaling.STAGES, 2.0)
    return {"cpus": cpus, "errors": 0, "steps": dict.fromkeys(scaling.STAGES, 9), "wall_s": wall_s, "steps_per_s": steps}


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(scaling.os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(scaling, "row_of", _row)
    return lambda *argv: monkeypatch.setattr(sys, "argv", ["scaling", *argv])


def test_ratios_are_to_the_first_row(cores, tmp_path, capsys):
    cores("debug", "--cpus", "2", "16", "--out", str(tmp_path / "scaling.json"))
    scaling.main()
    *_, two, sixteen = capsys.readouterr().out.splitlines()
    assert two == "| 2 | 2.0 | 200 | 1.00 | 2.0 | 200 | 1.00 | 0 |"
    assert sixteen == "| 16 | 2.0 | 1600 | 8.00 | 2.0 | 12800 | 64.00 | 0 |"
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["ratio"]["record"] for row in written["rows"]] == [1, 8]
    assert "hardware" in written


def test_more_cores_than_there_are_are_refused(cores, capsys):
    cores("--cpus", "2", "17")
    with pytest.raises(SystemExit):
        scaling.main()
    assert "must lie between 1 and the 16 of this machine" in capsys.readouterr().err
