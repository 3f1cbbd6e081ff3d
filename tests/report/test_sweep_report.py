"""What a sweep's results say: aggregation over seeds, the Pareto front, the choice of the best, the table and the page."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libra_ray.common.json_text import dump, parse, read
from libra_ray.config import preset
from libra_ray.report.sweep.records import SweepReport
from libra_ray.report.sweep.report import build_sweep, sweep_table, write_sweep
from libra_ray.runs.trials import Settings, TrialResult, best, configurations, pareto_front
from tests.report.builders import HARDWARE

BINS = (2, 6, 10, 32, 100)


def _trial(number, seed, successes, *, status="finished", latency=1.0, episodes=20, **values):
    played = {"policy": {"touch": [k < successes for k in range(episodes)]}} if status == "finished" else {}
    return TrialResult(
        number=number,
        seed=seed,
        values=values or {"action.bins": BINS[number]},
        status=status,
        episodes=played,
        measures={"val_plan_resolved": 0.5, "val_variance_explained": 0.25 * seed},
        latency_ms=latency,
        error="FloatingPointError: the loss became nan" if status == "failed" else None,
    )


SWEEP = [_trial(n, seed, s + seed) for n, s in enumerate((6, 12, 16, 11, 5)) for seed in range(3)]


def _built(trials, objectives=("success",), **more):
    return build_sweep(
        config=preset("debug"),
        space={"action.bins": "choice"},
        settings=Settings(trials=5, seeds=3, search="grid", scheduler="fifo"),
        trials=trials,
        objectives=objectives,
        importance={},
        wall_s=61,
        hardware=HARDWARE,
        mlflow_run_id=None,
        **more,
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_front_is_what_nobody_dominates(points):
    """Brute force over pairs, by the definition."""

    def dominates(a, b):
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    front = pareto_front(np.array(points, dtype=float))
    assert front == [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]


def test_a_configuration_is_the_mean_over_its_seeds():
    found = configurations([*SWEEP[::-1]])
    assert [c.number for c in found] == [0, 1, 2, 3, 4]
    assert found[2].success == pytest.approx((16 + 17 + 18) / 3 / 20)
    assert found[2].measure("val_variance_explained") == pytest.approx(0.25)
    low, high = found[2].interval
    assert low < found[2].success < high
    assert best(found).number == 2


def test_what_did_not_finish_counts_as_that_and_as_nothing_else():
    trials = [
        _trial(0, 0, 10),
        _trial(0, 1, 0, status="failed"),
        _trial(1, 0, 9),
        _trial(1, 1, 9),
        _trial(2, 0, 0, status="stopped"),
    ]
    found = configurations(trials)
    assert [c.success for c in found] == [0.5, 0.45, None]
    assert found[0].count("failed") == found[2].count("stopped") == 1
    assert best(found).number == 1, "one that fails with some seed is not recommended"
    assert best(configurations(trials[:2])).number == 0, "unless there is no other"
    assert best(configurations(trials[-1:])) is None


def test_of_equals_the_faster_one_is_best():
    assert best(configurations([_trial(0, 0, 10, latency=3.0), _trial(1, 0, 10, latency=2.0)])).number == 1


def test_results_survive_json():
    assert parse(SweepReport, dump(_built(SWEEP)), "sweep.json").trials == SWEEP


def test_the_table_says_what_failed_and_where_the_peak_is():
    report = _built([*SWEEP[:-1], _trial(4, 2, 0, status="failed")])
    table = sweep_table(report)
    rows = [line for line in table.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["2", "1", "3", "0", "4"], "best first"
    assert "1 failed" in rows[-1]
    assert "best" in rows[0]
    assert "15 planned, 14 finished, 1 failed" in table
    assert "configuration 4 failed: FloatingPointError: the loss became nan" in table
    assert re.search(r"peak is at N = 10 \(95 %", table)
    assert report.curves[0].peak.reference == 10


def test_the_front_is_reported_where_latency_is_sought():
    trials = [_trial(0, 0, 10, latency=1.0), _trial(1, 0, 15, latency=2.0), _trial(2, 0, 12, latency=3.0)]
    assert _built(trials, objectives=("success", "latency_ms")).front == [0, 1]
    assert _built(trials).front == []


def test_the_page_is_one_file_with_every_plot(tmp_path):
    joint = [_trial(n, s, 10 + n, latency=1.0 + n) for n in range(5) for s in range(2)]
    report = replace(_built(joint, objectives=("success", "latency_ms")), importance={"success": {"action.bins": 0.7}})
    page = write_sweep(tmp_path, report).read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"""(src|href)=["']https?://""", page)
    assert read(SweepReport, tmp_path / "sweep.json").front == report.front


def test_a_sweep_without_a_finished_trial_still_has_its_page(tmp_path):
    trials = [_trial(0, 0, 0, status="failed")]
    report = _built(trials)
    page = write_sweep(tmp_path, report).read_text()
    assert "<svg" not in page
    assert "1 failed" in page
    assert report.best is None
    assert "1 failed" in sweep_table(report)
