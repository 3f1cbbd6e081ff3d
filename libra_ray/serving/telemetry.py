"""What a gateway measures of its robots: metrics, and a snapshot for the live page."""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from libra_ray.control.disagreement import Replan
from libra_ray.control.margin import Latency, Margin
from libra_ray.serving.engine import Register
from libra_ray.serving.fleet_snapshot import WINDOW_S, FleetSnapshot, Measures, RobotRow, SlidingCounts, rounded, summary
from libra_ray.serving.metrics import EVENTS, LEVEL_MEASURES, MARGIN_STEPS, MEASURES, ROBOTS_CONNECTED
from libra_ray.serving.robot_sessions import forget_a_quarter

MAX_ROBOTS = 4096
"""Robots remembered; beyond, those silent for longest are forgotten: names come from outside and may be made up."""
MAX_NAME = 80
ENOUGH = 20
"""Latencies of a level by which it may be judged."""
MAX_REASONS = 30
OTHER_REASONS = "other"
REQUESTS = ""
"""Among the levels: what is measured of requests themselves."""
CONNECTIONLESS_S = 10.0
"""A robot that asks by plain HTTP counts as connected for so long after each request."""
TICKS_OBSERVED_PER_S = 100.0
"""Of more requests a random share goes into the histograms: Ray's agent replays their values one by one, those of ten seconds
at once, on a core that robots may be waiting for. Counters and the live page count all."""
_SMOOTHING = 0.1


@dataclass(slots=True)
class _RobotStats:
    """A robot as this gateway remembers it; times are the clock's. The snapshot fills in what its row says of them."""

    row: RobotRow
    since: float
    seen: float
    connections: int = 0
    connectionless: bool = True

    def connected(self, now: float) -> bool:
        """Whether it is there."""
        return now - self.seen < CONNECTIONLESS_S if self.connectionless else self.connections > 0


class Telemetry:
    """The measurements of one gateway replica. Its methods are called from one thread, the replica's event loop.

    Memory is bounded whatever robots call themselves and however many come. `tick` costs about 18 µs where Ray's four
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
        self._clock = clock
        measured = {REQUESTS: MEASURES} | dict.fromkeys(levels, LEVEL_MEASURES)
        self._tags = {level: {"level": level} if level else None for level in measured}
        self._windows = {level: {name: SlidingCounts[float]() for name in names} for level, names in measured.items()}
        self._events: SlidingCounts[str] = SlidingCounts()
        self._observe = {name: register(metric, deployment).observe for name, metric in (MEASURES | LEVEL_MEASURES).items()}
        self._count = {name: register(metric, deployment).inc for name, metric in EVENTS.items()}
        self._margin_steps = register(MARGIN_STEPS, deployment)
        self._last = levels[-1]
        self._robots_connected = register(ROBOTS_CONNECTED, deployment)
        self._robots: dict[str, _RobotStats] = {}
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
        metadata: Mapping[str, Any] = MappingProxyType({}),
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
            metadata: of the reply.
        """
        row, latency_ms = self._robot(robot).row, 1000 * latency_s
        row.requests += 1
        row.latency_ms = latency_ms + (1 - _SMOOTHING) * ((row.latency_ms or latency_ms) - latency_ms)
        row.intent_age_steps, row.holding, row.metadata = intent_age_steps, held, dict(metadata)
        row.held += held
        row.missed += missed
        self._ticks += 1
        self._count["answered"]()
        observed = random.random() < self._observed_share
        self._measured(REQUESTS, observed, latency_s=latency_s, batch_size=batch_size)
        for level, (steps, seconds) in ages.items():
            self._measured(level, observed, intent_age_steps=steps, intent_age_s=seconds)
        if held:
            self._happened("held")
        if missed:
            self._happened("missed")

    def call(self, level: str, *, seconds: float, batch_size: int, queued: int) -> None:
        """A batched call of a level was answered; `queued` requests waited for another when it was sent."""
        self._advance(self._clock())
        self._measured(level, True, call_s=seconds, call_batch=batch_size, queue=queued)

    def intent(self, level: str, seconds: float) -> None:
        """An intent of a level is there, `seconds` after its picture."""
        self._advance(self._clock())
        self._measured(level, True, intent_ready_s=seconds)

    def latencies(self) -> dict[str, Latency]:
        """Every level's of the last minute, where it was seen often enough: to an intent, of the last one to the reply."""
        self._advance(self._clock())
        seen = {level: windows["intent_ready_s"].total for level, windows in self._windows.items() if level != REQUESTS}
        seen[self._last] = self._windows[REQUESTS]["latency_s"].total
        found = {}
        for level, counts in seen.items():
            marks = summary(counts, 1000)
            if marks["count"] >= ENOUGH:
                robots = summary(self._windows[level]["call_batch"].total)["mean"] or 1.0
                found[level] = Latency(p50_ms=marks["p50"], p95_ms=marks["p95"], robots=robots)
        return found

    def replanned(self, replans: Sequence[Replan]) -> None:
        """Fresh intents replaced those in use: how far they differ."""
        for replan in replans:
            observed = random.random() < self._observed_share
            self._measured(replan.level, observed, replan_difference=replan.difference)
            if replan.share is not None:
                self._measured(replan.level, observed, replan_share=replan.share)

    def refused(self, reason: str) -> None:
        """A request was refused; `reason` is one of a few words of ours, such as `wrong shape`, never the request's."""
        if reason not in self._refused and len(self._refused) >= MAX_REASONS:
            reason = OTHER_REASONS
        self._refused[reason] += 1
        self._count["refused"](tags={"reason": reason})

    def episode_ended(self, robot: str, success: bool | None) -> None:
        """A robot reported the end of an episode; None where it did not say how."""
        row = self._robot(robot).row
        outcome = "unknown" if success is None else "success" if success else "failure"
        row.episodes += 1
        row.judged += success is not None
        row.successes += success is True
        self._episodes[outcome] += 1
        self._count["episodes"](tags={"outcome": outcome})

    def snapshot(self, margins: Mapping[str, Margin] = MappingProxyType({})) -> FleetSnapshot:
        """What happened of late, as a value; forgets robots that left a minute ago.

        Args:
            margins: by level, at present.
        """
        now = self._clock()
        self._advance(now)
        gone = [name for name, robot in self._robots.items() if not robot.connections and now - robot.seen > WINDOW_S]
        for name in gone:
            del self._robots[name]
        rows = tuple(
            replace(known.row, connected=known.connected(now), connected_s=now - known.since, silent_s=now - known.seen)
            for known in self._robots.values()
        )
        self._robots_connected.set(sum(row.connected for row in rows))
        for name, margin in margins.items():
            self._margin_steps.set(margin.margin_steps, tags={"level": name})
        measures = {level: Measures.of(windows) for level, windows in self._windows.items()}
        return FleetSnapshot(
            time=time.time(),
            robots=rows,
            measures=measures.pop(REQUESTS),
            levels=measures,
            events=dict(self._events.total),
            refused=dict(self._refused),
            episodes=dict(self._episodes),
            margins=dict(margins),
        )

    def _robot(self, name: str) -> _RobotStats:
        now = self._clock()
        self._advance(now)
        if len(name) > MAX_NAME:
            name = f"{name[: MAX_NAME - 1]}…"
        known = self._robots.get(name)
        if known is None:
            if len(self._robots) >= MAX_ROBOTS:
                forget_a_quarter(self._robots, lambda robot: (robot.connections > 0, robot.seen))
            known = self._robots[name] = _RobotStats(row=RobotRow(name=name), since=now, seen=now)
        known.seen = now
        return known

    def _advance(self, now: float) -> None:
        if now >= self._next_slice:
            seconds = int(now - self._next_slice) + 1
            self._next_slice += seconds
            self._observed_share = min(1.0, TICKS_OBSERVED_PER_S * seconds / max(1, self._ticks))
            self._ticks = 0
            self._events.advance(seconds)
            for windows in self._windows.values():
                for window in windows.values():
                    window.advance(seconds)

    def _measured(self, level: str, observed: bool, **values: float) -> None:
        """Values of a level, or of requests; for the live page, and where `observed` for Prometheus too."""
        windows, tags = self._windows[level], self._tags[level]
        for name, value in values.items():
            windows[name].add(rounded(value))
            if observed:
                self._observe[name](value, tags=tags)

    def _happened(self, name: str) -> None:
        self._events.add(name)
        self._count[name]()
