"""How late answers are in simulated time: every draw is a function of the seed, the episode, the level and the step.

So an episode does not depend on which robots run beside it, and the same trace and seed give the same episode again.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libra_ray.config import DelayConfig
from libra_ray.types import Level

LATENCIES = "level_latencies_ms"
"""Where a trace has them: level -> milliseconds from each picture to its answer."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """When an answer comes, in control steps after the observation behind it.

    Attributes:
        due: when it is counted on: from then on its level may be asked again.
        usable: when it is there; None never.
    """

    due: int
    usable: int | None


@dataclass(frozen=True)
class Delays:
    """The lateness of every answer.

    Args:
        config: fixed delays, shares of lost and reordered intents, the seed.
        measured: by level the delays to draw from in place of the fixed ones, in control steps.
    """

    config: DelayConfig = field(default_factory=DelayConfig)
    measured: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def chunk(self, level: str, episode: int, step: int) -> int:
        """Control steps until a chunk of the last level is there."""
        return self._steps(level, self.config.chunk_steps, self._draws(level, episode, step))

    def intent(self, level: str, episode: int, step: int) -> Arrival:
        """When an intent comes."""
        draws = self._draws(level, episode, step)
        due = self._steps(level, self.config.intent_steps, draws)
        lost, reordered = self.config.lost_share, self.config.reordered_share
        chance = draws.random() if lost or reordered else 1.0
        if chance < lost:
            return Arrival(due=due, usable=None)
        # The next one is asked for when this one is due, and takes as long.
        return Arrival(due=due, usable=2 * due + 1 if chance < lost + reordered else due)

    def _draws(self, level: str, episode: int, step: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, episode, zlib.crc32(level.encode()), step))

    def _steps(self, level: str, fixed: int, draws: np.random.Generator) -> int:
        return int(draws.choice(self.measured[level])) if self.measured else fixed


def open_delays(config: DelayConfig, levels: Sequence[Level], control_hz: float) -> Delays:
    """The delays of a policy's levels, drawn from the trace where one is given.

    Raises:
        ValueError: the trace is not what `jobs/drive.py --out` writes, or lacks a level.
    """
    if not config.trace:
        return Delays(config)
    try:
        kept = json.loads(Path(config.trace).read_bytes())[LATENCIES]
        latencies = {level: _latencies(level, values) for level, values in kept.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"delay.trace={config.trace} holds no latencies ({type(error).__name__}: {error}); "
            "give a file that jobs/drive.py --out wrote"
        ) from None
    try:
        return Delays(config, in_steps(latencies, levels, config.control_hz or control_hz))
    except ValueError as error:
        raise ValueError(f"delay.trace={config.trace}: {error}; give one of a served policy with these levels") from None


def _latencies(level: str, values: Any) -> NDArray[np.float64]:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not (np.isfinite(found) & (found >= 0)).all():
        raise ValueError(f"those of level {level} are not all numbers of milliseconds from 0 on")
    return found


def in_steps(
    latencies_ms: Mapping[str, Sequence[float] | NDArray[np.float64]], levels: Sequence[Level], control_hz: float
) -> dict[str, NDArray[np.int64]]:
    """Measured latencies as whole control steps.

    An intent is usable at the first step that begins after it came: rounded up. A chunk that comes before the step of its
    picture is over is in time, for robots execute it then: rounded down.

    Raises:
        ValueError: a level has no latencies.
    """
    if missing := [level.name for level in levels if not len(latencies_ms.get(level.name, ()))]:
        has = ", ".join(latencies_ms) or "none"
        names = ", ".join(level.name for level in levels)
        raise ValueError(f"it has no latencies of level {missing[0]}, but of {has}; the policy's levels are {names}")
    found = {level.name: np.asarray(latencies_ms[level.name]) * control_hz / 1000 for level in levels}
    last = levels[-1].name
    return {name: (np.floor if name == last else np.ceil)(steps).astype(np.int64) for name, steps in found.items()}
