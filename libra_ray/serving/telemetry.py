"""What a gateway measures of its robots: metrics, and a snapshot for the live page."""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from libra_ray.serving.engine import Register
from libra_ray.serving.fleet_snapshot import WINDOW_S, FleetSnapshot, Measures, RobotRow, SlidingCounts, rounded
from libra_ray.serving.metrics import EVENTS, LEVEL_MEASURES, MEASURES, ROBOTS_CONNECTED

MAX_ROBOTS = 4096
"""Robots remembered; beyond, those silent for longest are forgotten: names come from outside and may be made up."""
MAX_NAME = 80
MAX_REASONS = 30
OTHER_REASONS = "other"
CONNECTIONLESS_S = 10.0
"""A robot that asks by plain HTTP counts as connected for so long after each request."""
TICKS_OBSERVED_PER_S = 100.0
"""Of more requests a random share goes into the histograms: Ray's agent replays their values one by one, those of ten seconds
at once, on a core that robots may be waiting for. Counters and the live page count all."""
_SMOOTHING = 0.1


@dataclass(slots=True)
class _Robot:
    """A robot as this gateway remembers it; times are the clock's."""

    since: float
    seen: float
    connections: int = 0
    connectionless: bool = True
    holding: bool = False
    latency_s: float | None = None
    intent_age_steps: int | None = None
    requests: int = 0
    held: int = 0
    missed: int = 0
    episodes: int = 0
    judged: int = 0
    successes: int = 0

    def connected(self, now: float) -> bool:
        """Whether it is there."""
        return now - self.seen < CONNECTIONLESS_S if self.connectionless else self.connections > 0

    def row(self, name: str, now: float) -> RobotRow:
        """The robot for the snapshot."""
        return RobotRow(
            name=name,
            connected=self.connected(now),
            connected_s=now - self.since,
            silent_s=now - self.seen,
            latency_ms=None if self.latency_s is None else 1000 * self.latency_s,
            intent_age_steps=self.intent_age_steps,
            holding=self.holding,
            requests=self.requests,
            held=self.held,
            missed=self.missed,
            episodes=self.episodes,
            judged=self.judged,
            successes=self.successes,
        )


class Telemetry:
    """The measurements of one gateway replica. Its methods are called from one thread, the replica's event loop.

    Memory is bounded whatever robots call themselves and however many come. `tick` costs about 17 µs where Ray's four
    histograms are told, 12 of them theirs; they are not saved up for the snapshot, which would then keep the robots waiting.

    Args:
        deployment: the label `deployment` of every metric.
        register: announces a metric.
        levels: names of the policy's levels, slow to fast.
        clock: seconds that never go back.
    """

    def __init__(
        self, deployment: str, register: Register, levels: Sequence[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._tags = clock, {level: {"level": level} for level in levels}
        self._windows: dict[str, SlidingCounts[float]] = {name: SlidingCounts() for name in MEASURES}
        self._level_windows = {level: {name: SlidingCounts[float]() for name in LEVEL_MEASURES} for level in levels}
        self._events: SlidingCounts[str] = SlidingCounts()
        self._observe = {name: register(metric, deployment).observe for name, metric in (MEASURES | LEVEL_MEASURES).items()}
        self._count = {name: register(metric, deployment).inc for name, metric in EVENTS.items()}
        self._robots_connected = register(ROBOTS_CONNECTED, deployment)
        self._robots: dict[str, _Robot] = {}
        self._refused: Counter[str] = Counter()
        self._episodes: Counter[str] = Counter()
        self._next_slice = clock() + 1
        self._ticks, self._observed_share = 0, 1.0

    def connected(self, robot: str) -> None:
        """A connection of the robot was opened."""
        known = self._robot(robot)
        if not known.connections:
            known.since = known.seen
        known.connections += 1
        known.connectionless = False

    def disconnected(self, robot: str) -> None:
        """A connection of the robot was closed. It keeps its counts for a minute, should it come back."""
        known = self._robot(robot)
        known.connections = max(0, known.connections - 1)

    def tick(
        self,
        robot: str,
        *,
        latency_s: float,
        batch_size: int,
        ages: Mapping[str, tuple[int, float]],
        intent_age_steps: int | None,
        held: bool,
        missed: bool,
    ) -> None:
        """A request was answered.

        Args:
            latency_s: from its arrival to its reply, in seconds.
            batch_size: robots answered in the same call.
            ages: per level above the last, control steps and seconds since the picture behind its intent; without an intent
                it is left out.
            intent_age_steps: of the intent behind the reply; None without one.
            held: the reply holds the last safe action.
            missed: the reply is later than its control deadline.
        """
        known = self._robot(robot)
        known.requests += 1
        known.latency_s = latency_s + (1 - _SMOOTHING) * ((known.latency_s or latency_s) - latency_s)
        known.intent_age_steps, known.holding = intent_age_steps, held
        self._ticks += 1
        self._count["answered"]()
        observed = random.random() < self._observed_share
        self._measured("latency_s", latency_s, observed=observed)
        self._measured("batch_size", batch_size, observed=observed)
        for level, (steps, seconds) in ages.items():
            self._measured_of(level, "intent_age_steps", steps, observed=observed)
            self._measured_of(level, "intent_age_s", seconds, observed=observed)
        if held:
            known.held += 1
            self._happened("held")
        if missed:
            known.missed += 1
            self._happened("missed")

    def call(self, level: str, *, seconds: float, batch_size: int, queued: int) -> None:
        """A batched call of a level was answered; `queued` requests waited for another when it was sent."""
        self._advance(self._clock())
        self._measured_of(level, "call_s", seconds)
        self._measured_of(level, "call_batch", batch_size)
        self._measured_of(level, "queue", queued)

    def refused(self, reason: str) -> None:
        """A request was refused; `reason` is one of a few words of ours, such as `wrong shape`, never the request's."""
        if reason not in self._refused and len(self._refused) >= MAX_REASONS:
            reason = OTHER_REASONS
        self._refused[reason] += 1
        self._count["refused"](tags={"reason": reason})

    def episode_ended(self, robot: str, success: bool | None) -> None:
        """A robot reported the end of an episode; None where it did not say how."""
        known = self._robot(robot)
        outcome = "unknown" if success is None else "success" if success else "failure"
        known.episodes += 1
        known.judged += success is not None
        known.successes += success is True
        self._episodes[outcome] += 1
        self._count["episodes"](tags={"outcome": outcome})

    def snapshot(self) -> FleetSnapshot:
        """What happened of late, as a value; forgets robots that left a minute ago."""
        now = self._clock()
        self._advance(now)
        gone = [name for name, robot in self._robots.items() if not robot.connections and now - robot.seen > WINDOW_S]
        for name in gone:
            del self._robots[name]
        self._robots_connected.set(sum(robot.connected(now) for robot in self._robots.values()))
        return FleetSnapshot(
            time=time.time(),
            robots=tuple(robot.row(name, now) for name, robot in self._robots.items()),
            measures=Measures.of(self._windows),
            levels={level: Measures.of(windows) for level, windows in self._level_windows.items()},
            events=dict(self._events.total),
            refused=dict(self._refused),
            episodes=dict(self._episodes),
        )

    def _robot(self, name: str) -> _Robot:
        now = self._clock()
        self._advance(now)
        if len(name) > MAX_NAME:
            name = f"{name[: MAX_NAME - 1]}…"
        known = self._robots.get(name)
        if known is None:
            if len(self._robots) >= MAX_ROBOTS:
                self._forget_a_quarter()
            known = self._robots[name] = _Robot(since=now, seen=now)
        known.seen = now
        return known

    def _forget_a_quarter(self) -> None:
        """Many at once, so that a flood of made-up names costs little each."""
        by_age = sorted(self._robots, key=lambda name: (self._robots[name].connections > 0, self._robots[name].seen))
        for name in by_age[: MAX_ROBOTS // 4]:
            del self._robots[name]

    def _advance(self, now: float) -> None:
        if now >= self._next_slice:
            seconds = int(now - self._next_slice) + 1
            self._next_slice += seconds
            self._observed_share = min(1.0, TICKS_OBSERVED_PER_S * seconds / max(1, self._ticks))
            self._ticks = 0
            self._events.advance(seconds)
            for windows in (self._windows, *self._level_windows.values()):
                for window in windows.values():
                    window.advance(seconds)

    def _measured(self, name: str, value: float, *, observed: bool = True) -> None:
        self._windows[name].add(rounded(value))
        if observed:
            self._observe[name](value)

    def _measured_of(self, level: str, name: str, value: float, *, observed: bool = True) -> None:
        self._level_windows[level][name].add(rounded(value))
        if observed:
            self._observe[name](value, tags=self._tags[level])

    def _happened(self, name: str) -> None:
        self._events.add(name)
        self._count[name]()
