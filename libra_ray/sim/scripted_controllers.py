"""Controllers that need no policy: the scripted expert, which records, and one that never moves, a floor to compare with."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from libra_ray.types import Action, Environment, Observation

BURST_STEPS = (5, 12)
"""Shortest and longest disturbance, in control steps."""
PAUSE_STEPS = (10, 40)
"""Shortest and longest undisturbed stretch before each disturbance: time for the expert to recover."""
GRIPPER = 3
_NOISE_STREAM, _RECOVERY_STREAM = 0x6E6F6973, 0x7265636F
"""Keep noise and mistakes independent of each other and of the placement, all drawn from the same seed."""


class Mistaken(Protocol):
    """A mistake under way."""

    def action(self, label: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is executed in place of the expert's own action; asked once every control step."""


@runtime_checkable
class Fallible(Protocol):
    """An environment whose expert can be made to make a mistake."""

    def mistake(self, rng: np.random.Generator) -> Mistaken:
        """A mistake in the episode that was just started."""


@dataclass
class ExpertController:
    """The environment's scripted expert, on some episodes pushed off its path so that recovery is in the data.

    A disturbance is one random displacement, held for a while: white noise would average out within a few steps and leave the
    hand on the expert's path. The gripper is never disturbed, so nothing is dropped that the expert cannot pick up again.
    On some episodes it makes one mistake, such as to close the gripper on nothing, and goes on from there. `Action.label` is
    always the expert's own action.

    Args:
        noise_std: standard deviation of a disturbance in action units (range [-1, 1], 1 is 1 cm per step).
        noise_share: share of the episodes with disturbances; the seed decides which.
        recovery_share: share of the episodes with a mistake, of environments that are `Fallible`; the seed decides which,
            whether or not there are disturbances too.
    """

    noise_std: float = 0.0
    noise_share: float = 0.0
    recovery_share: float = 0.0
    needs_images: bool = False
    _rng: np.random.Generator = field(default_factory=np.random.default_rng, repr=False)

    def reset(self, environment: Environment, seed: int) -> None:
        """Bind to the episode's environment; everything random follows from `seed`."""
        self._environment = environment
        self._rng = np.random.default_rng([seed, _NOISE_STREAM])
        self._noisy = self.noise_std > 0 and self._rng.random() < self.noise_share
        self._offset: NDArray[np.float32] = np.zeros(environment.action_dim, np.float32)
        self._pause, self._burst = self._drawn(PAUSE_STEPS), 0
        self._mistake: Mistaken | None = None
        rng = np.random.default_rng([seed, _RECOVERY_STREAM])
        if rng.random() < self.recovery_share:
            assert isinstance(environment, Fallible), "the configuration's check refuses others"
            self._mistake = environment.mistake(rng)

    def act(self, observation: Observation) -> Action:
        """The expert's action as label; as value the same, or what the mistake makes of it, disturbed or not."""
        label = self._environment.expert_action()
        value = label if self._mistake is None else self._mistake.action(label)
        if self._noisy:
            value = np.clip(value + self._disturbance(), -1, 1).astype(np.float32)
        return Action(value=value, label=label)

    def _disturbance(self) -> NDArray[np.float32]:
        if self._pause > 0:
            self._pause -= 1
            if self._pause == 0:
                self._burst = self._drawn(BURST_STEPS)
                self._offset = self._rng.normal(0, self.noise_std, self._offset.shape).astype(np.float32)
                self._offset[GRIPPER] = 0
            return np.zeros_like(self._offset)
        self._burst -= 1
        if self._burst == 0:
            self._pause = self._drawn(PAUSE_STEPS)
        return self._offset

    def _drawn(self, bounds: tuple[int, int]) -> int:
        return int(self._rng.integers(bounds[0], bounds[1] + 1))


@dataclass
class ZeroController:
    """Never moves: tasks it solves are no evidence of anything."""

    needs_images: bool = False

    def reset(self, environment: Environment, seed: int) -> None:
        """Note the action's size."""
        self._action = np.zeros(environment.action_dim, np.float32)

    def act(self, observation: Observation) -> Action:
        """Zeros."""
        return Action(value=self._action, label=self._action)
