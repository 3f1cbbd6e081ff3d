"""The robots of one gateway: each one's control, what it saw last, whose connection it is."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from libra_ray.control.robot import RobotControl
from libra_ray.types import Intent, Observation

FORGET_S = 120.0
"""A robot without a connection is remembered for so long: it may come back, or ask by plain HTTP."""


@dataclass(frozen=True, kw_only=True)
class ServedIntent(Intent):
    """An intent with the name of the weights that made it; the level below reads it by the same weights, to its end.

    Attributes:
        ready_at: when it was there, on the clock of `made_at`.
    """

    weights: str
    ready_at: float


@dataclass(eq=False)
class RobotSession:
    """One robot as a gateway knows it.

    Attributes:
        control: its intents, its chunk and when to ask for what: the code that evaluation runs.
        seen: its newest observation, and `seen_at` when it came, on the gateway's clock.
        pace_s: between its last two observations; 0 where it has shown only one.
        episode: counts its episodes here; an intent for an earlier one is not accepted.
        next_step: the step of its next observation where it sends none.
        answered: set whenever a level above the last has answered or failed.
        owner: the connection that it came by last.
        busy: whether a request of it is under way.
    """

    name: str
    control: RobotControl
    seen: Observation | None = None
    seen_at: float = 0.0
    pace_s: float = 0.0
    episode: int = 0
    next_step: int = 0
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    owner: object | None = None
    busy: bool = False
    used_at: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """A new episode: earlier intents are forgotten, also those under way."""
        self.control.reset()
        self.episode += 1
        self.next_step = 0
        self.seen = None
        self.pace_s = 0.0

    def show(self, observation: Observation, at_s: float) -> None:
        """What it sees now."""
        self.pace_s = 0.0 if self.seen is None else at_s - self.seen_at
        self.seen, self.seen_at = observation, at_s


def forget_a_quarter[T](robots: dict[str, T], age: Callable[[T], tuple[bool, float]]) -> None:
    """Make room: forget those of least `age`. Many at once, so that a flood of made-up names costs little each."""
    for name in sorted(robots, key=lambda name: age(robots[name]))[: max(1, len(robots) // 4)]:
        del robots[name]


class RobotSessions:
    """All robots of a gateway, by name.

    Args:
        make_control: makes a new robot's control.
        limit: robots remembered; beyond, those silent for longest are forgotten.
    """

    def __init__(self, make_control: Callable[[], RobotControl], limit: int) -> None:
        self._make_control, self._limit = make_control, limit
        self._robots: dict[str, RobotSession] = {}

    def named(self, name: str) -> RobotSession:
        """The robot of that name, new where there was none."""
        robot = self._robots.get(name)
        if robot is None:
            if len(self._robots) >= self._limit:
                forget_a_quarter(self._robots, lambda robot: (robot.owner is not None, robot.used_at))
            robot = self._robots[name] = RobotSession(name=name, control=self._make_control())
        robot.used_at = time.monotonic()
        return robot

    def left(self, owner: object) -> list[str]:
        """A connection ended; the names of its robots."""
        names = []
        for robot in self._robots.values():
            if robot.owner is owner:
                robot.owner = None
                names.append(robot.name)
        return names

    def tidy(self) -> None:
        """Forget those that have not been heard of for `FORGET_S`."""
        old = time.monotonic() - FORGET_S
        for name in [n for n, robot in self._robots.items() if robot.owner is None and robot.used_at < old]:
            del self._robots[name]

    def clear(self) -> None:
        """Forget all, as when the action space changes; those that wait for an intent wait no longer."""
        for robot in self._robots.values():
            robot.begin()
            robot.answered.set()
        self._robots.clear()
