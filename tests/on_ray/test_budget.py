"""The success of a budget's candidates on a real fleet: delays, settings, and what is done is not done again."""

import json
from dataclasses import replace

import pytest

from libra_ray.budget.answer import answered_budget, question_of
from libra_ray.budget.plot import budget_plot
from libra_ray.budget.profile import measured_profile
from libra_ray.budget.table import budget_table
from libra_ray.common.json_text import plain
from libra_ray.config import from_json
from libra_ray.control.delays import open_delays
from libra_ray.on_ray import budget
from libra_ray.sim import control_hz
from tests.on_ray.trained import trained

HZ = 20.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("budget")


@pytest.fixture(scope="module")
def asked(place):
    checkpoint = trained(place / "checkpoint", sim__max_steps=12, refiner__denoising_steps=2, control__rule="overlap")
    question = question_of(checkpoint, budget_ms=60_000, control_hz=HZ, robots=1, rule="", committed=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("libra_ray.budget.stopwatch.CALLS", 3)
        profile = measured_profile(checkpoint, "cpu", threads=1, jpeg=90)
    return checkpoint, question, profile


def test_candidates_are_evaluated_as_late_and_with_the_steps_that_they_say(ray_cluster, place, asked, monkeypatch):
    checkpoint, question, profile = asked
    budget.check_success(checkpoint, question, 1)
    loaded = []
    load = budget.load_policy
    monkeypatch.setattr(budget, "load_policy", lambda *a, **k: loaded.append(k["changes"]) or load(*a, **k))
    chosen = []

    def success(found):
        # Two are enough, and later than they are.
        chosen.extend(replace(c, late_steps={"planner": 3, "refiner": n}) for n, c in enumerate(found[-2:], start=1))
        return budget.measured_success(place / "out", checkpoint, question, profile, chosen, 1)

    report = answered_budget(checkpoint, question, profile, success)
    assert loaded == [{"refiner.denoising_steps": c.denoising_steps} for c in chosen]
    done = [c for c in report.candidates if c.success is not None]
    assert [(c.denoising_steps, c.execute_steps) for c in done] == [(c.denoising_steps, c.execute_steps) for c in chosen]
    assert all(c.success.episodes == 1 and 0 <= c.success.low <= c.success.rate <= c.success.high <= 1 for c in done)
    assert report.measured
    assert report.proposal in done
    assert any(c.front for c in done)
    assert ">front<" in budget_plot(report), "as text"
    assert "front: over latency and success in simulated time" in budget_table(report)
    assert not any(c.front for c in report.candidates if c.success is None)
    for c in chosen:
        [cell] = (place / "out" / budget.CELLS).glob(f"*_k{c.denoising_steps}_e{c.execute_steps}_*")
        config = from_json((cell / "config.json").read_text())
        assert config.control.execute_steps == c.execute_steps
        delays = open_delays(config.delay, question.levels, control_hz(config.sim))
        assert {name: steps.tolist() for name, steps in delays.measured.items()} == {n: [s] for n, s in c.late_steps.items()}

    # A second time nothing is loaded or played.
    loaded.clear()
    again = budget.measured_success(place / "out", checkpoint, question, profile, chosen, 1)
    assert loaded == []
    assert json.dumps(plain(again)) == json.dumps(
        plain([replace(c, success=a.success) for c, a in zip(chosen, again, strict=True)])
    )


def test_a_checkpoint_of_another_robot_has_no_simulator(place, asked):
    other = trained(place / "slow" / "checkpoint", control_hz=10)
    with pytest.raises(ValueError, match="of another robot"):
        budget.check_success(other, asked[1], 1)
