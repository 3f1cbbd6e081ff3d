"""The study's tables and sentences say what its trials say, and its curves cross where they cross."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import granularity as study
from benchmarks.files import RESULTS, write_result
from benchmarks.granularity_pages import crossings
from benchmarks.results_table import read_between
from libra_ray.common.json_text import dump, parse, plain, read
from libra_ray.config import override, preset
from libra_ray.runs.trials import TrialResult
from tests.spaces import load_space

ROOT = Path(__file__).parents[2]
RATES = {2: 0.3, 4: 0.5, 10: 0.8, 32: 0.6, 100: 0.35}


def _trials(rates=RATES):
    trials = []
    for encoder in ("own", "shared"):
        for number, (n, rate) in enumerate(rates.items()):
            for seed in range(3):
                hits = [k < round(40 * rate) + seed - 1 for k in range(40)]
                trials.append(
                    TrialResult(
                        number=number + 10 * (encoder == "shared"),
                        seed=seed,
                        values={"action.bins": n, "refiner.vision": encoder},
                        status="finished",
                        episodes={"policy": {"touch": hits}, "coarse_only": {"touch": [False] * 40}},
                        measures={"val_plan_resolved": 0.9 - 0.15 * np.log(n), "val_variance_explained": 0.1 * np.log(n)},
                        latency_ms=2.0,
                        wall_s=100.0,
                    )
                )
    return trials


def _result(trials):
    config = override(preset("tabletop"), study.STUDY)
    space = load_space(study.SPACE, config)
    settings = study.study(space, quick=False, seeds=3, hours=0, concurrent=0)
    return study.result(config, settings, space, trials)


def test_the_study_is_what_was_asked_for():
    config = override(preset("tabletop"), study.STUDY)
    points = load_space(study.SPACE, config).grid()
    assert {(p["action.bins"], p["refiner.vision"]) for p in points} == {
        (n, vision) for n in (2, 4, 6, 10, 16, 32, 64, 100) for vision in ("own", "shared")
    }
    assert config.evaluate.episodes_per_task * len(config.sim.tasks) >= 100
    assert _result([]).settings.trials * 3 == 48


def test_the_tables_hold_what_was_measured():
    found = _result(_trials())
    text = study.markdown(found)
    assert study.markdown(parse(study.Study, dump(found), "granularity.json")) == text
    own = text.split("### Shared features")[0]
    [row] = [line for line in own.splitlines() if line.startswith("| 10 | **")]
    assert row.startswith("| 10 | **0.80 (")
    assert "| 0.00 (0.00–0.00) | +0.80 (" in row, "the planner alone never succeeds here"
    assert row.endswith("| 3 | 2.00 |")
    assert "The peak is at N = 10 (95 %" in own
    assert "an inverted U" in own
    assert study.plot(_trials()).startswith("<svg")


def test_half_a_study_has_half_a_text():
    few = [trial for trial in _trials() if trial.values["action.bins"] < 10]
    assert "there is no curve yet" in study.markdown(_result(few))
    assert "there is no curve yet" in study.markdown(_result([]))


def test_curves_cross_where_they_are_equal():
    bins = [2, 4, 6, 10, 16, 32, 64, 100]
    planner, refiner = [0.9 - 0.15 * np.log(n) for n in bins], [0.1 * np.log(n) for n in bins]
    assert crossings(bins, planner, refiner) == pytest.approx([np.exp(0.9 / 0.25)])
    assert crossings(bins, [1.0] * 8, [0.0] * 8) == []
    assert crossings([2, 4, 8], [0, 1, 0], [0, 0, 0]) == pytest.approx([2, 8])
    assert crossings([2, 8], [1, 0], [0, 1]) == pytest.approx([4])


def test_the_plot_for_a_file_has_no_variables_left():
    svg = study.standalone(study.plot(_trials()))
    assert "var(--" not in svg
    assert 'fill="white"' in svg


def test_another_machine_goes_on_with_the_finished_cells(tmp_path):
    config = override(preset("tabletop"), study.STUDY)
    space = load_space(study.SPACE, config)
    settings = study.study(space, quick=False, seeds=3, hours=0, concurrent=0)
    here = study.SweepFolder.open(tmp_path / "here", config, space, settings, resume=False)
    finished, failed = [
        replace(_trials()[0], seed=seed, values=space.grid()[0], status=s) for seed, s in enumerate(("finished", "failed"))
    ]
    for result in (finished, failed):
        here.write(study.TrialSpec(number=result.number, seed=result.seed, values=result.values)).end(result)
    path = tmp_path / "results.json"
    write_result(path, study.result(config, settings, space, here.results()))

    there = study.SweepFolder.open(tmp_path / "there", config, space, settings, resume=False)
    study.restore(tmp_path / "none.json", there)
    assert there.results() == []
    study.restore(path, there)
    assert there.results() == [finished], "a failed cell is tried again"

    elsewhere = override(config, {"ray.simulator_actors": 7, study.PLACE: "/here/it/lies"})
    more = replace(settings, hours=3.0, concurrent=2)
    study.restore(path, study.SweepFolder.open(tmp_path / "elsewhere", elsewhere, space, more, resume=False))
    other = study.SweepFolder.open(tmp_path / "other", override(config, {"train.steps": 7}), space, settings, resume=False)
    with pytest.raises(ValueError, match=r"another train\.steps"):
        study.restore(path, other)


def test_the_page_shows_the_committed_cells():
    shown = read_between(ROOT / "docs" / "granularity.md", "granularity.py")
    assert shown == (RESULTS / "granularity.md").read_text().strip()
    found = read(study.Study, RESULTS / "granularity.json")
    assert study.markdown(found).strip() == shown
    assert study.markdown(_result(found.trials)).strip() == shown


def test_the_committed_study_is_read_and_written_as_it_was():
    path = RESULTS / "granularity.json"
    assert plain(read(study.Study, path)) == json.loads(path.read_text())


def test_the_committed_cells_still_count(tmp_path):
    """They were measured when some settings had other names."""
    path = RESULTS / "granularity.json"
    committed = read(study.Study, path)
    assert {"refiner.condition", "control.planner_delay_steps"} <= committed.config.keys()
    config = override(preset("tabletop"), study.STUDY)
    space = load_space(study.SPACE, config)
    sweep = study.SweepFolder.open(tmp_path / "sweep", config, space, committed.settings, resume=False)
    study.restore(path, sweep)
    assert sweep.results() == list(committed.trials)
    other = override(config, {"model.system": "monolithic"})
    sweep = study.SweepFolder.open(tmp_path / "other", other, space, committed.settings, resume=False)
    with pytest.raises(ValueError, match=r"another model\.system"):
        study.restore(path, sweep)
