"""Mistakes that the expert is made to make in mid-task, so that demonstrations show how to go on from them."""

from collections.abc import Set
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from libra_ray.sim.tabletop.expert import CLOSE, OPEN, expert_action
from libra_ray.sim.tabletop.goals import GoalProgress
from libra_ray.sim.tabletop.physics import World

Moment = Literal["grasp", "release", "way"]
"""`grasp`: it takes the thing to be elsewhere, closes there, on nothing or askew, and stays. `release`: it takes the goal to be
elsewhere, lets go there, and stays. `way`: the hand is shoved, in every other such episode with the fingers torn open, but
never those that hold a peg, which would topple."""
_HELD_NOTHING = {"touch", "push"}
"""Parts in which nothing is grasped."""
_TOPPLES = {"insert", "stack"}
"""Parts in which what is let go at a wrong place topples over, and cannot be taken again."""
_BESIDE_M = ((-0.007, 0.007), (0.008, 0.03))
"""Between the fingers, and across them where they do not push it: the thing is grasped at its edge, or missed."""
_ABOVE_M = (0.022, 0.03)
"""From where the open fingers' tips are above a block."""
_ASIDE_M, _DROP_M = (0.006, 0.025), (0.0, 0.02)
"""How far from its goal, and from how high, a thing is let go."""
_STAY_STEPS, _SHOVE_STEPS, _SHOVED_AT = (3, 8), (3, 6), (3, 24)
_LONGEST_STEPS = 40
"""After so many control steps a mistake is over in any case: something stands where it wanted to go."""

_CLOSE_HERE, _OPEN_HERE = (np.array((0, 0, 0, grip), np.float32) for grip in (CLOSE, OPEN))


class Mistake:
    """One mistake of one episode; everything about it follows from the state of `rng`.

    Args:
        world: the table, just reset.
        progress: the episode's.
        tolerance_mm: the task's.
        in_hand: whether the thing is held already when the episode begins.
        rng: of this mistake alone.

    Attributes:
        moment: when it is made.
    """

    def __init__(
        self, world: World, progress: GoalProgress, tolerance_mm: float, *, in_hand: bool, rng: np.random.Generator
    ) -> None:
        self._world, self._progress, self._tolerance_mm = world, progress, tolerance_mm
        kinds = {part.kind for part in progress.parts}
        self.moment: Moment = rng.choice(_possible(kinds, in_hand=in_hand))
        high = rng.random() < 0.5
        beside = rng.uniform(*np.transpose(_BESIDE_M)) * (1, rng.choice((-1, 1)))
        self._grasp_off = np.array([*beside, rng.uniform(*_ABOVE_M) * high])
        angle = rng.uniform(0, 2 * np.pi)
        way = np.array((np.cos(angle), np.sin(angle)))
        self._release_off = np.array([*(way * rng.uniform(*_ASIDE_M)), rng.uniform(*_DROP_M) * high])
        self._shove = np.array([*way, rng.uniform(0, 1)])
        self._torn_open = high and "insert" not in kinds
        self._at = int(rng.integers(_SHOVED_AT[0], _SHOVED_AT[1] + 1))
        bounds = _SHOVE_STEPS if self.moment == "way" else _STAY_STEPS
        self._stay = int(rng.integers(bounds[0], bounds[1] + 1))
        self._left = _LONGEST_STEPS
        self._let_go = False

    def action(self, label: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is executed in place of the expert's own action, `(4,)` in [-1, 1]; to be asked once every control step."""
        if self._left == 0 or self._stay == 0:
            return label
        match self.moment:
            case "grasp":
                value = self._miss()
            case "release":
                value = self._misplace(label)
            case "way":
                value = self._shoved(label)
        self._left -= bool((value != label).any())
        return value

    def _miss(self) -> NDArray[np.float32]:
        value = self._mistaken(grasp_off_m=self._grasp_off)
        # It has arrived where it takes the thing to be.
        self._stay -= bool((value == _CLOSE_HERE).all())
        return value

    def _misplace(self, label: NDArray[np.float32]) -> NDArray[np.float32]:
        value = self._mistaken(release_off_m=self._release_off)
        self._let_go |= bool((value == _OPEN_HERE).all() and (label != value).any())
        self._stay -= self._let_go
        return _OPEN_HERE if self._let_go else value

    def _shoved(self, label: NDArray[np.float32]) -> NDArray[np.float32]:
        self._at -= 1
        if self._at >= 0:
            return label
        self._stay -= 1
        return np.array([*self._shove, OPEN if self._torn_open else label[3]], np.float32)

    def _mistaken(self, **off_m: NDArray[np.float64]) -> NDArray[np.float32]:
        return expert_action(self._world, self._progress, self._tolerance_mm, **off_m)


def _possible(kinds: Set[str], *, in_hand: bool) -> list[Moment]:
    """The moments to draw from; grasping twice, because policies fail there most."""
    possible: list[Moment] = ["way"]
    if kinds - _HELD_NOTHING:
        possible += [] if in_hand else ["grasp", "grasp"]
        possible += [] if kinds & _TOPPLES else ["release"]
    return possible
