"""What a gateway measures of its robots: metrics, and a snapshot for the live page."""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from libra_ray.control.disagreement import Replan
from libra_ray.control.margin import Latency, Margin
from libra_ray.serving.fleet_snapshot import REQUESTS, FleetSnapshot, RobotRow, SlidingCounts, rounded, summary
from libra_ray.serving.metrics import EVENTS, LEVEL_MEASURES, MARGIN_STEPS, MEASURES, ROBOTS_CONNECTED, Metric

ENOUGH = 20
"""Latencies of a level by which it may be judged."""
MAX_REASONS = 30
OTHER_REASONS = "other"
TICKS_OBSERVED_PER_S = 100.0
"""Of more requests a random share goes into the histograms: Ray's agent replays their values one by one, those of ten seconds
at once, on a core that robots may be waiting for. Counters and the live page count all."""
_SMOOTHING = 0.1


class Telemetry:
    """The measurements of one gateway replica. Its methods are called from one thread, the replica's event loop.

    `tick` costs about 18 µs where Ray's four histograms are told, 12 of them theirs; they are not saved up for the snapshot,
    which would then keep the robots waiting.

    Args:
        deployment: the label `deployment` of every metric.
        register: announces a metric; see `Engine.register`.
        levels: names of the policy's levels, slow to fast.
    """

    def __init__(
        self,
        deployment: str,
        register: Callable[[Metric, str], Any],
        levels: Sequence[str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._levels, self._clock = tuple(levels), clock
        names = {REQUESTS: (*MEASURES, "held", "missed")} | dict.fromkeys(levels, tuple(LEVEL_MEASURES))
        self._windows = {(level, name): SlidingCounts() for level in names for name in names[level]}
        self._tags = {level: {"level": level} if level else None for level in names}
        self._observe = {name: register(metric, deployment).observe for name, metric in (MEASURES | LEVEL_MEASURES).items()}
        self._count = {name: register(metric, deployment).inc for name, metric in EVENTS.items()}
        self._margin_steps = register(MARGIN_STEPS, deployment)
        self._robots_connected = register(ROBOTS_CONNECTED, deployment)
        self._refused: Counter[str] = Counter()
        self._episodes: Counter[str] = Counter()
        self._next_slice = clock() + 1
        self._ticks, self._observed_share = 0, 1.0

    def tick(
        self,
        row: RobotRow,
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
            row: of its robot.
            latency_s: from its arrival to its reply, in seconds.
            batch_size: robots answered in the same call.
            ages: per level above the last, control steps and seconds since the picture behind its intent; without an intent
                it is left out.
            intent_age_steps: of the intent behind the reply; None without one.
            held: the reply holds the last safe action.
            missed: the reply is later than its control deadline.
            metadata: of the reply.
        """
        self._advance()
        latency_ms = 1000 * latency_s
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
        for name, happened in (("held", held), ("missed", missed)):
            if happened:
                self._windows[REQUESTS, name].add(1.0)
                self._count[name]()

    def call(self, level: str, *, seconds: float, batch_size: int, queued: int) -> None:
        """A batched call of a level was answered; `queued` requests waited for another when it was sent."""
        self._advance()
        self._measured(level, True, call_s=seconds, call_batch=batch_size, queue=queued)

    def intent(self, level: str, seconds: float) -> None:
        """An intent of a level is there, `seconds` after its picture."""
        self._advance()
        self._measured(level, True, intent_ready_s=seconds)

    def latencies(self) -> dict[str, Latency]:
        """Every level's of the last minute, where it was seen often enough: to an intent, of the last one to the reply."""
        self._advance()
        found = {}
        for level in self._levels:
            reply = level == self._levels[-1]
            marks = summary(self._windows[(REQUESTS, "latency_s") if reply else (level, "intent_ready_s")].total, 1000)
            if marks["count"] >= ENOUGH:
                robots = summary(self._windows[level, "call_batch"].total)["mean"] or 1.0
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

    def episode_ended(self, row: RobotRow, success: bool | None) -> None:
        """The robot of that row reported the end of an episode; None where it did not say how."""
        outcome = "unknown" if success is None else "success" if success else "failure"
        row.episodes += 1
        row.judged += success is not None
        row.successes += success is True
        self._episodes[outcome] += 1
        self._count["episodes"](tags={"outcome": outcome})

    def snapshot(self, robots: Sequence[RobotRow] = (), margins: Mapping[str, Margin] = MappingProxyType({})) -> FleetSnapshot:
        """What happened of late, as a value, with the robots and the levels' margins of this moment."""
        self._advance()
        self._robots_connected.set(sum(row.connected for row in robots))
        for name, margin in margins.items():
            self._margin_steps.set(margin.margin_steps, tags={"level": name})
        return FleetSnapshot(
            time=time.time(),
            robots=tuple(robots),
            levels=self._levels,
            window={of: Counter(counts.total) for of, counts in self._windows.items()},
            recent={of: counts.recent() for of, counts in self._windows.items()},
            refused=Counter(self._refused),
            episodes=Counter(self._episodes),
            margins=dict(margins),
        )

    def _advance(self) -> None:
        """Before anything is counted or told: begin the slices that it is time for."""
        now = self._clock()
        if now >= self._next_slice:
            seconds = int(now - self._next_slice) + 1
            self._next_slice += seconds
            self._observed_share = min(1.0, TICKS_OBSERVED_PER_S * seconds / max(1, self._ticks))
            self._ticks = 0
            for window in self._windows.values():
                window.advance(seconds)

    def _measured(self, level: str, observed: bool, **values: float) -> None:
        """Values of a level, or of requests; for the live page, and where `observed` for Prometheus too."""
        tags = self._tags[level]
        for name, value in values.items():
            self._windows[level, name].add(rounded(value))
            if observed:
                self._observe[name](value, tags=tags)
