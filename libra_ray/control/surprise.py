"""Whether an observation is a surprise, in proprioception or in the picture: what a plan assumed may no longer hold."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from libra_ray.types import Observation

PIXEL_STRIDE = 4
"""Every fourth pixel of every fourth row tells enough of how much a picture changed."""


@dataclass
class RunningScale:
    """The usual size of a quantity: a running mean square.

    Args:
        warm_up: values before which nothing is unusual.
        keep: weight of the past per value.
        floor: root mean square below which everything is noise.
    """

    warm_up: int = 8
    keep: float = 0.95
    floor: float = 0.0
    _square: float = 0.0
    _count: int = 0

    def exceeded(self, value: float, times: float) -> bool:
        """Whether `value` is more than `times` as large as usual; what is unusual raises the measure, but slowly."""
        scale = max(math.sqrt(self._square), self.floor)
        unusual = self._count >= self.warm_up and value > times * scale
        seen = min(value, times * scale) if unusual else value
        self._count += 1
        weight = max(1 - self.keep, 1 / self._count)
        self._square += weight * (seen**2 - self._square)
        return unusual


@dataclass
class SurpriseDetector:
    """Detects surprises of one robot, by a prediction that is learned while it moves and kept over its episodes.

    Between two observations the robot executes some actions. That their sum moves the proprioception linearly is learned by
    least squares with forgetting, so no controller has to be described: position deltas are such a case, and where
    nothing is linear the usual error is large. An observation is a surprise where the error of that prediction, or the mean
    change of the picture, is more than `times` as large as it usually is.

    Args:
        times: how unusual a surprise is.
        forget: weight of the past per observation.
    """

    times: float = 3.0
    forget: float = 0.99
    _error: RunningScale = field(default_factory=lambda: RunningScale(floor=1e-6))
    _change: RunningScale = field(default_factory=lambda: RunningScale(floor=2.0))
    _learned: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    _state: NDArray[np.float32] | None = None
    _pixels: NDArray[np.int16] | None = None

    def reset(self) -> None:
        """A new episode: nothing was seen before; what was learned stays."""
        self._state = self._pixels = None

    def surprised(self, observation: Observation, executed: NDArray[np.float32] | None) -> bool:
        """Whether this observation is a surprise.

        Args:
            executed: sum `(D,)` of the actions since the last observation; None where unknown: then nothing is predicted.
        """
        moved = self._moved(observation.state, executed)
        changed = self._changed(observation)
        return moved or changed

    def _moved(self, state: NDArray[np.float32], executed: NDArray[np.float32] | None) -> bool:
        before, self._state = self._state, state
        if before is None or executed is None:
            return False
        moved = (state - before).astype(np.float64)
        if self._learned is None:
            self._learned = np.zeros((len(executed), len(executed))), np.zeros((len(executed), len(state)))
        # Sums over the past, rather than the gain itself: their rounding errors are forgotten too, and what is never done is 0.
        squares, products = self._learned
        next_to_nothing = 1e-3 + 1e-9 * np.trace(squares)
        gain = np.linalg.solve(squares + next_to_nothing * np.eye(len(executed)), products)
        unusual = self._error.exceeded(float(np.linalg.norm(moved - executed @ gain)), self.times)
        done = executed.astype(np.float64)
        self._learned = self.forget * squares + np.outer(done, done), self.forget * products + np.outer(done, moved)
        return unusual

    def _changed(self, observation: Observation) -> bool:
        if not observation.images:
            return False
        first = next(iter(observation.images.values()))
        before, self._pixels = self._pixels, first[::PIXEL_STRIDE, ::PIXEL_STRIDE].astype(np.int16)
        return before is not None and self._change.exceeded(float(np.abs(self._pixels - before).mean()), self.times)
