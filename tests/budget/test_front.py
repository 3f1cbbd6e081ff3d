"""What fits fits, nothing on the front is beaten, and more budget never leaves less to choose from."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libra_ray.budget.front import candidates, least_chunks, proposed, with_front
from libra_ray.budget.latency import fitted
from libra_ray.budget.records import GATEWAY, MeasuredSuccess
from libra_ray.control.margin import Latency, margins
from tests.budget.builders import MODELS, calls, question
from tests.policies import dual_levels

QUESTIONS = st.builds(
    question,
    budget_ms=st.floats(1, 200),
    control_hz=st.floats(1, 100),
    robots=st.integers(1, 100),
    control=st.fixed_dictionaries(
        {"rule": st.sampled_from(["overlap", "event", "fifo"]), "committed_steps": st.integers(0, 2)}
    ),
)


def measured(rate):
    return MeasuredSuccess(successes=round(100 * rate), episodes=100, rate=rate, low=rate, high=rate)


def setting(candidate):
    return candidate.denoising_steps, candidate.execute_steps


@given(QUESTIONS)
def test_a_proposal_is_within_the_budget_in_time_and_serves_all(asked):
    found = with_front(candidates(asked, MODELS))
    for c in [*(c for c in found if c.fits), *filter(None, [proposed(found, asked)])]:
        assert c.ms <= asked.budget_ms
        assert c.robots >= asked.robots
        assert min(c.margin_steps.values()) >= 0
    assert (proposed(found, asked) is None) == (not any(c.fits for c in found))


@given(QUESTIONS, st.floats(1, 10))
def test_more_budget_never_leaves_less_to_choose_from(asked, more):
    few, many = (
        {setting(c) for c in candidates(replace(asked, budget_ms=ms), MODELS) if c.fits}
        for ms in (asked.budget_ms, more * asked.budget_ms)
    )
    assert few <= many


@given(QUESTIONS, st.randoms(use_true_random=False), st.booleans())
def test_nothing_on_the_front_is_beaten_and_what_is_off_it_is(asked, random, evaluated):
    found = candidates(asked, MODELS)
    if evaluated:
        found = [replace(c, success=measured(random.randrange(5) / 4)) for c in found]
    found = with_front(found)
    fit = [c for c in found if c.fits]
    assert not any(c.front for c in found if not c.fits)
    assert any(c.front for c in fit) == bool(fit)
    for c in fit if evaluated else ():
        better = [
            o for o in fit if o.ms <= c.ms and o.success.rate >= c.success.rate and (o.ms, o.success) != (c.ms, c.success)
        ]
        assert c.front == (not better)
    if fit:
        assert proposed(found, asked).front or not evaluated


def test_the_margins_are_those_of_the_latencies_that_it_reckons_with():
    asked = question(robots=4, control_hz=80.0)
    for c in candidates(asked, MODELS):
        way = MODELS["gateway"].ms(c.batch) + MODELS["transport"].ms(c.batch)
        ms = {name: way + MODELS[name].ms(c.batch, c.denoising_steps) for name in ("planner", "refiner")}
        latencies = {name: Latency(p50_ms=value, p95_ms=value) for name, value in ms.items()}
        control = replace(asked.control, execute_steps=c.execute_steps)
        assert c.ms == pytest.approx(ms["refiner"])
        assert c.margin_steps == {m.level: m.margin_steps for m in margins(asked.levels, latencies, 80.0, control)}


def test_nothing_is_proposed_on_less_than_was_measured():
    """One slow measure among many: where the model of all lies below it, the measure counts."""
    slow = {"refiner": (1, 6, 45.0), GATEWAY: (1, 0, 30.0)}
    rows = {name: calls(model, (1, 6, 12) if name == "refiner" else (0,)) for name, model in MODELS.items()}
    for name, (batch, steps, ms) in slow.items():
        rows[name] = [replace(c, p95_ms=ms) if (c.batch, c.steps) == (batch, steps) else c for c in rows[name]]
    models = {name: fitted(measured) for name, measured in rows.items()}
    asked = question(budget_ms=60.0)
    found = {c.denoising_steps: c for c in candidates(asked, models) if c.execute_steps == 5}
    assert found[6].ms >= 75
    assert not found[6].fits
    assert proposed([*found.values()], asked).denoising_steps < 6


def test_a_robot_that_waits_for_its_plan_waits_for_both_levels():
    """Under `fifo` the decision is as late as all levels together, and no margin of a plan counts."""
    waiting, running = (candidates(question({"rule": rule}), MODELS) for rule in ("fifo", "overlap"))
    for one, other in zip(waiting, running, strict=True):
        assert one.ms == pytest.approx(other.ms + MODELS["planner"].ms(one.batch))
        assert list(one.margin_steps) == ["refiner"]


def test_without_success_the_settings_nearest_to_the_checkpoints_are_proposed():
    asked = question()
    assert setting(proposed(candidates(asked, MODELS), asked)) == (6, 5)
    small = replace(asked, budget_ms=MODELS["refiner"].ms(1, 3) + 1)
    assert setting(proposed(candidates(small, MODELS), small)) == (2, 5)


def test_with_success_the_best_is_proposed_and_the_fastest_of_the_best():
    asked, rates = question(), {(2, 5): 0.9, (4, 5): 0.9, (6, 5): 0.8}
    found = [replace(c, success=measured(rates.get(setting(c), 0.1))) for c in candidates(asked, MODELS)]
    assert setting(proposed(with_front(found), asked)) == (2, 5)


def test_what_a_late_plan_needs_is_said_in_chunks():
    """A planner of 22 ms at 400 Hz is 10 steps late: whole plans of two chunks are not enough."""
    asked = question(control_hz=400.0)
    late = [c for c in candidates(asked, MODELS) if any("planner" in miss for miss in c.misses)]
    assert late
    assert all("action.chunks=" in miss for c in late for miss in c.misses if "planner" in miss)
    for chunks in (2, 4, 8):
        longer = question(control_hz=100.0, levels=dual_levels(5 * chunks, 5))
        fit = [c for c in candidates(longer, MODELS) if c.fits]
        assert all(least_chunks(longer, c) <= chunks for c in fit)
        assert {least_chunks(longer, c) for c in fit} <= {2, 3, 4}, "what is needed does not depend on what there is"
    assert least_chunks(question(), None) is None


def test_a_checkpoint_that_denoises_nothing_has_no_steps_to_choose():
    found = candidates(question(denoised="", trained_steps=0), MODELS)
    assert {c.denoising_steps for c in found} == {0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_ms": 0.0}, "--ms 0 is no time; give a number above 0"),
        ({"budget_ms": float("nan")}, "--ms nan is no time"),
        ({"control_hz": -1.0}, "--hz -1 is no rate; give a number above 0"),
        ({"robots": 0}, "--robots 0 must be at least 1"),
    ],
)
def test_numbers_that_nothing_could_meet_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        question(**changes)
