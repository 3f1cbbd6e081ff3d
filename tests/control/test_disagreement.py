"""Re-plan disagreement: what is compared with what, and which replacements are noted."""

import numpy as np
import pytest

from libra_ray.config import ControlConfig, DelayConfig
from libra_ray.control.delays import Delays
from libra_ray.control.disagreement import Replan, replanned
from libra_ray.control.lockstep import drive
from libra_ray.control.robot import RobotControl
from libra_ray.types import Intent, Level
from tests.control.test_robot import LEVELS, H, L, StubPolicy, late, observe


def intent(first: int, covers: int = 4, **values) -> Intent:
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return Intent(level="planner", values=arrays, first_step=first, covers=covers)


def test_classes_are_compared_over_the_steps_that_both_cover():
    used = intent(0, tokens=[[0, 0], [1, 1], [2, 2], [3, 3]])
    fresh = intent(2, tokens=[[2, 5], [3, 2], [9, 9], [9, 9]])
    assert replanned(used, fresh) == [Replan(level="planner", value="tokens", share=0.5, difference=1.0)]


def test_a_small_unsigned_type_does_not_wrap():
    used, fresh = (intent(0, tokens=np.full((4, 1), value, np.uint8)) for value in (200, 10))
    assert replanned(used, fresh)[0].difference == 190
    assert replanned(fresh, used)[0].difference == 190


def test_real_numbers_have_a_difference_and_no_share():
    used, fresh = intent(0, pace=np.zeros((4, 2))), intent(1, pace=np.full((4, 2), 0.25))
    assert replanned(used, fresh) == [Replan(level="planner", value="pace", share=None, difference=0.25)]


def test_only_numbers_with_a_row_a_step_and_one_shape_in_both_are_compared():
    used = intent(
        0, mean=np.zeros(2), scalar=3, words=["a"] * 4, wide=np.zeros((4, 2)), gone=np.zeros(4), same=np.zeros(4, int)
    )
    fresh = intent(1, mean=np.ones(2), scalar=4, words=["b"] * 4, wide=np.zeros((4, 3)), new=np.zeros(4), same=np.zeros(4, int))
    assert [replan.value for replan in replanned(used, fresh)] == ["same"]


@pytest.mark.parametrize("covers", [2, 4, 7])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_whatever_each_covers_steps_are_matched(first, covers):
    """A plan that says at every step what the one in use said never differs, however both lie."""
    used, fresh = intent(0, tokens=np.arange(4)), intent(first, covers, tokens=np.arange(first, first + covers))
    (found,) = replanned(used, fresh)
    assert (found.share, found.difference) == (0.0, 0.0)


def test_there_is_nothing_to_compare_where_no_step_is_covered_by_both():
    used = intent(0, tokens=np.arange(4))
    assert replanned(None, used) == []
    assert [len(replanned(used, intent(first, tokens=np.arange(4)))) for first in (3, 4, 5)] == [1, 0, 0]


def replans_of(policy, steps=60, **control):
    """All that a robot of that policy notes."""
    delays = control.pop("delays", Delays())
    robot, step = RobotControl(ControlConfig(**control), LEVELS), 0
    while step < steps:
        step += len(drive({0: robot}, {0: observe(0, step)}, policy, {}, delays)[0])
    return robot, robot.take_replans()


@pytest.mark.parametrize("delay", [0, 1, H])
def test_every_replacement_of_an_intent_in_use_is_noted_once(delay):
    """However late it is: as long as no more than one is under way, the same ones are compared over the same steps.

    The stub's plans say of which step they speak and since when they hold: one of three entries differs, by H.
    """
    robot, noted = replans_of(StubPolicy(), rule="overlap", delays=late(delay))
    taken_up = -(-delay // H) * H
    assert len(noted) == len(range(H + taken_up, 60, H))
    assert {(replan.level, replan.value) for replan in noted} == {("planner", "tokens")}
    assert [replan.share for replan in noted] == pytest.approx([1 / 3] * len(noted))
    assert [replan.difference for replan in noted] == pytest.approx([H / 3] * len(noted))
    assert robot.take_replans() == []


@pytest.mark.parametrize("delay", [0, 3, 7])
def test_an_intent_that_is_used_up_is_not_replaced(delay):
    assert replans_of(StubPolicy(), rule="fifo", delays=late(delay))[1] == []


def test_what_never_comes_replaces_nothing():
    lost = Delays(DelayConfig(intent_steps=1, lost_share=1.0))
    assert replans_of(StubPolicy(), rule="overlap", delays=lost)[1] == []


def test_a_new_episode_forgets_them():
    robot, _ = replans_of(StubPolicy(), rule="overlap")
    for step in (60, 65):
        drive({0: robot}, {0: observe(0, step)}, StubPolicy(), {})
    robot.reset()
    assert robot.take_replans() == []
    assert robot == RobotControl(ControlConfig(rule="overlap"), LEVELS)


def test_every_level_above_the_last_has_its_own():
    """Also one that the last level does not read."""
    levels = (Level(name="goal", covers=2 * L), Level(name="planner", covers=L, reads="goal"), LEVELS[-1])
    robot = RobotControl(ControlConfig(rule="overlap"), levels)
    for first in (0, 5):
        for level in levels[:-1]:
            values = {"tokens": np.full(level.covers, first)}
            robot.accept_intent(Intent(level=level.name, values=values, first_step=first, covers=level.covers), first)
            robot.current(level.name, first)
    assert [(replan.level, replan.difference) for replan in robot.take_replans()] == [("goal", 5.0), ("planner", 5.0)]
