"""Lockstep time: a policy as the controller of one robot."""

from time import perf_counter

import numpy as np
import pytest

from libra_ray.config import ControlConfig, DelayConfig
from libra_ray.control.delays import Delays
from libra_ray.control.lockstep import PolicyController, drive
from libra_ray.control.robot import RobotControl
from libra_ray.spec import UNDECLARED, VectorSpec
from libra_ray.types import ActionChunk, Level
from tests.control.test_robot import H, observe

ONE = (Level(name="policy", covers=H),)


class Counting:
    """A policy of one level whose actions count on."""

    levels = ONE

    def infer(self, level, observations, above):
        actions = [np.arange(1, 2 * H + 1, dtype=np.float32).reshape(H, 2) + o.step for o in observations]
        return [
            ActionChunk(actions=values, first_step=o.step, intent_first_step=o.step)
            for o, values in zip(observations, actions, strict=True)
        ]


@pytest.mark.parametrize(
    ("action", "kept"), [(VectorSpec(delta=False), [1, 1]), (VectorSpec(delta=True), [0, 1]), (UNDECLARED, [0, 1])]
)
def test_a_controller_holds_as_its_actions_are_declared(action, kept):
    """In each of its episodes, and there is no age of an intent where there is no level above."""
    controller = PolicyController(Counting(), ControlConfig(), delays=Delays(DelayConfig(chunk_steps=2)), action=action)
    for seed in (0, 1):
        controller.reset(None, seed)
        done = [controller.act(observe(0, step)) for step in range(H + 2)]
        assert [act.held for act in done] == [False] * H + [True] * 2
        assert {act.intent_age_steps for act in done[H:]} == {None}
        for held in done[H:]:
            np.testing.assert_array_equal(held.value, done[H - 1].value * kept)


class Deserting(Counting):
    """One robot gets no answer."""

    def infer(self, level, observations, above):
        return super().infer(level, observations, above)[1:]


def test_a_policy_that_leaves_a_robot_without_an_answer_is_no_policy():
    robots = {name: RobotControl(ControlConfig(), ONE) for name in (0, 1)}
    with pytest.raises(ValueError, match="shorter"):
        drive(robots, {name: observe(name, 0) for name in robots}, Deserting(), {}, Delays())


def test_what_calls_took_is_no_more_than_went_by():
    robots, latencies = {name: RobotControl(ControlConfig(), ONE) for name in (0, 1)}, {}
    began = perf_counter()
    for step in range(0, 3 * H, H):
        drive(robots, {name: observe(name, step) for name in robots}, Counting(), latencies, Delays())
    assert 0 < sum(latencies["policy"].ms) < 1000 * (perf_counter() - began)
    assert latencies["policy"].batch == [2, 2, 2]
