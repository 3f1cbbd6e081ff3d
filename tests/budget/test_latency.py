"""The latency model says what was measured."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libra_ray.budget.latency import fitted
from libra_ray.budget.records import LatencyModel, TimedCall
from tests.budget.builders import calls

TERM = st.floats(0, 50)


@given(overhead=st.floats(0.01, 50), per_robot=TERM, per_step=TERM, per_step_robot=TERM)
def test_what_follows_the_model_is_reproduced_where_it_was_measured_and_between(overhead, per_robot, per_step, per_step_robot):
    true = LatencyModel(overhead=overhead, per_robot=per_robot, per_step=per_step, per_step_robot=per_step_robot)
    found = fitted(calls(true))
    assert found.worst_error < 1e-4
    for batch, steps in ((1, 1), (3, 2), (32, 9), (64, 12)):
        assert found.ms(batch, steps) == pytest.approx(true.ms(batch, steps), rel=1e-3)


def test_noise_moves_it_no_further_than_itself():
    rng = np.random.default_rng(0)
    true = LatencyModel(overhead=3, per_robot=0.5, per_step=1, per_step_robot=0.1)
    found = fitted(calls(true, noise=lambda: rng.uniform(0.95, 1.05)))
    assert found.worst_error < 0.1
    assert found.ms(10, 4) == pytest.approx(true.ms(10, 4), rel=0.05)


@given(st.lists(st.floats(0.01, 1e3), min_size=12, max_size=12))
def test_more_robots_or_steps_never_take_less_whatever_was_measured(ms):
    """Else a proposal could rest on a latency below 0."""
    measured = [TimedCall(batch=c.batch, steps=c.steps, p50_ms=p95, p95_ms=p95) for c, p95 in zip(calls(_ONE), ms, strict=True)]
    found = fitted(measured)
    assert min(found.overhead, found.per_robot, found.per_step, found.per_step_robot) >= 0
    assert found.ms(1, 1) <= found.ms(2, 1) <= found.ms(2, 2)
    said = [abs(found.ms(c.batch, c.steps) / c.p95_ms - 1) for c in measured]
    assert found.worst_error == pytest.approx(max(said))


@given(st.lists(st.floats(0.01, 1e3), min_size=12, max_size=12))
def test_it_never_says_less_than_was_measured_of_no_more_work(ms):
    """A fit through noise lies below some of it: a proposal would promise what this machine was seen not to keep."""
    measured = [TimedCall(batch=c.batch, steps=c.steps, p50_ms=0, p95_ms=p95) for c, p95 in zip(calls(_ONE), ms, strict=True)]
    found = fitted(measured)
    for batch, steps in ((1, 1), (4, 1), (5, 6), (16, 6), (20, 9), (64, 12), (100, 20)):
        seen = [c.p95_ms for c in measured if c.batch <= batch and c.steps <= steps]
        assert found.ms(batch, steps) >= max(seen)


_ONE = LatencyModel(overhead=1, per_robot=1)


def test_a_level_without_steps_has_no_term_of_steps():
    found = fitted(calls(_ONE, steps=(0,)))
    assert (found.per_step, found.per_step_robot) == (0, 0)
    assert found.ms(5) == pytest.approx(6)


def test_nothing_to_fit_to_is_refused():
    with pytest.raises(ValueError, match="at least one measured call"):
        fitted([])
