"""The robots of one gateway: each one's control, what it saw last, whose connection it is, and what the page shows of it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from libra_ray.control.robot import RobotControl
from libra_ray.serving.fleet_snapshot import WINDOW_S, RobotRow
from libra_ray.serving.requests import BadRequestError
from libra_ray.types import Intent, Observation

FORGET_S = 120.0
"""A robot without a connection is remembered for so long: it may come back, or ask by plain HTTP."""
CONNECTIONLESS_S = 10.0
"""A robot that asks by plain HTTP counts as connected for so long after each request."""
MAX_NAME = 80


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
    """One robot as a gateway knows it; times are on the gateway's clock.

    Attributes:
        control: its intents, its chunk and when to ask for what: the code that evaluation runs.
        row: what the page shows of it; `RobotSessions.rows` fills in what changes with time.
        seen: its newest observation, and `seen_at` when it came.
        pace_s: between its last two observations; 0 where it has shown only one.
        episode: counts its episodes here; an intent for an earlier one is not accepted.
        next_step: the step of its next observation where it sends none.
        answered: set whenever a level above the last has answered or failed.
        owner: the connection that it came by last, while that stands.
        displaced: standing connections that its name was taken from by a newer one.
        since: when its connection was opened, or where it has none, when it first asked.
        connectionless: whether it never had one.
        busy: whether a request of it is under way.
        used_at: when it asked last, or left.
    """

    name: str
    control: RobotControl
    row: RobotRow
    seen: Observation | None = None
    seen_at: float = 0.0
    pace_s: float = 0.0
    episode: int = 0
    next_step: int = 0
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    owner: object | None = None
    displaced: set[object] = field(default_factory=set)
    since: float = 0.0
    connectionless: bool = True
    busy: bool = False
    used_at: float = 0.0

    def come_by(self, owner: object, at_s: float) -> None:
        """It asks by this connection. The newest one keeps the name, for a robot that comes back need not have been missed yet.

        Raises:
            BadRequestError: a newer connection has the name: two robots would act under each other's intents.
        """
        if owner in self.displaced:
            text = f"a newer connection goes by the name of robot {self.name!r}; names must be unique in the fleet"
            raise BadRequestError("displaced", text)
        if self.owner is None:
            self.since = at_s
        elif self.owner is not owner:
            self.displaced.add(self.owner)
        self.owner, self.connectionless = owner, False

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


class RobotSessions:
    """All robots of a gateway, by name. Memory is bounded whatever robots call themselves and however many come.

    Args:
        make_control: makes a new robot's control.
        limit: robots remembered; beyond, those silent for longest are forgotten.
    """

    def __init__(
        self, make_control: Callable[[], RobotControl], limit: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make_control, self._limit, self._clock = make_control, limit, clock
        self._robots: dict[str, RobotSession] = {}

    def named(self, name: str, owner: object | None = None) -> RobotSession:
        """The robot of that name, new where there was none; from now on it is that of the connection `owner`, if any.

        Raises:
            BadRequestError: see `RobotSession.come_by`.
        """
        robot, now = self._robots.get(name), self._clock()
        if robot is None:
            if len(self._robots) >= self._limit:
                self._forget_a_quarter()
            row = RobotRow(name=name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…")
            robot = self._robots[name] = RobotSession(name=name, control=self._make_control(), row=row, since=now)
        if owner is not None:
            robot.come_by(owner, now)
        robot.used_at = now
        return robot

    def left(self, owner: object) -> None:
        """A connection ended."""
        for robot in self._robots.values():
            robot.displaced.discard(owner)
            if robot.owner is owner:
                robot.owner, robot.used_at = None, self._clock()

    def rows(self) -> list[RobotRow]:
        """Of those connected, and of those that left or asked last within the last minute."""
        now, rows = self._clock(), []
        for robot in self._robots.values():
            silent_s = now - robot.used_at
            connected = robot.owner is not None or (robot.connectionless and silent_s < CONNECTIONLESS_S)
            if connected or silent_s <= WINDOW_S:
                rows.append(replace(robot.row, connected=connected, connected_s=now - robot.since, silent_s=silent_s))
        return rows

    def tidy(self) -> None:
        """Forget those that have not been heard of for `FORGET_S`."""
        old = self._clock() - FORGET_S
        self._robots = {name: robot for name, robot in self._robots.items() if robot.owner is not None or robot.used_at >= old}

    def begin_anew(self) -> None:
        """Other levels than before: nobody has seen or done anything, and those that wait for an intent wait no longer."""
        for name, robot in [*self._robots.items()]:
            robot.begin()
            robot.answered.set()
            # What is under way ends with the control that it began with.
            self._robots[name] = replace(robot, control=self._make_control(), answered=asyncio.Event(), busy=False)

    def _forget_a_quarter(self) -> None:
        """Many at once, so that a flood of made-up names costs little each."""
        longest = sorted(self._robots.values(), key=lambda robot: (robot.owner is not None, robot.used_at))
        for robot in longest[: max(1, len(longest) // 4)]:
            del self._robots[robot.name]
