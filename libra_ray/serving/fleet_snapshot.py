"""What a gateway saw of its robots of late, as a value: snapshots of several gateways add up to that of the fleet."""

import math
import operator
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from libra_ray.control.margin import Margin
from libra_ray.stats.intervals import PERCENTILES
from libra_ray.types import Json

WINDOW_S = 60
"""Percentiles and shares speak of this many seconds."""
RECENT_S = 5
"""Rates and the page's curves speak of this many seconds, so that a change is seen at once."""
LISTED_ROBOTS = 256
SILENT_S = 5.0
"""A gateway that says nothing for so long is gone."""
HISTORY_S = 180
REQUESTS = ""
"""Among the levels: what is measured of requests themselves."""
_MANTISSA = 128

type Measured = Mapping[tuple[str, str], Counter[float]]
"""By a level and a measure's name, how often each (rounded) value was seen."""


def rounded(value: float) -> float:
    """The value to within 0.8 %, so that few different ones remain; zero and whole numbers up to 128 stay what they are."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * _MANTISSA) / _MANTISSA, exponent)


class SlidingCounts:
    """Counts per (rounded) value over the last seconds, in slices of one second.

    Attributes:
        total: counts over the whole window, the slice that still fills included.
    """

    def __init__(self, seconds: int = WINDOW_S) -> None:
        self.total: Counter[float] = Counter()
        self._slices: deque[Counter[float]] = deque([Counter() for _ in range(seconds)])

    def add(self, value: float) -> None:
        """Count one."""
        self._slices[-1][value] += 1
        self.total[value] += 1

    def advance(self, seconds: int) -> None:
        """Begin a new slice, `seconds` after the one that now ends; what falls out of the window is forgotten."""
        for _ in range(min(seconds, len(self._slices))):
            for value, count in self._slices.popleft().items():
                self.total[value] -= count
                if not self.total[value]:
                    del self.total[value]
            self._slices.append(Counter())

    def recent(self, seconds: int = RECENT_S) -> Counter[float]:
        """Counts over the last `seconds` whole slices; the one that still fills is left out."""
        return sum(list(self._slices)[-1 - seconds : -1], Counter())


def summary(counts: Mapping[float, int], scale: float = 1.0) -> Json:
    """`count`, and `p50`, `p95`, `p99` (nearest rank), `mean` and `max` times `scale`; None where nothing was seen."""
    count = sum(counts.values())
    if not count:
        return {"count": 0} | dict.fromkeys([*(f"p{p}" for p in PERCENTILES), "mean", "max"])
    marks: Json = {}
    below = 0
    for value in sorted(counts):
        below += counts[value]
        for p in PERCENTILES:
            if f"p{p}" not in marks and 100 * below >= p * count:
                marks[f"p{p}"] = scale * value
    mean = scale * sum(value * times for value, times in counts.items()) / count
    return {"count": count, **marks, "mean": mean, "max": scale * max(counts)}


@dataclass(kw_only=True)
class RobotRow:
    """One robot of the fleet.

    Attributes:
        name: as the robot calls itself, so nothing to trust; shortened.
        connected: whether it holds a connection, or asked within the last seconds where it has none to hold.
        connected_s: seconds since its connection opened.
        silent_s: seconds since its last request, or since it left.
        latency_ms: mean over about its last ten requests.
        intent_age_steps: age of the intent behind the last reply, in control steps.
        holding: whether the last reply held the last action.
        held: its requests that were answered by holding the last action.
        missed: its requests that were answered after their deadline.
        judged: its ended episodes whose success was reported.
        metadata: of the last reply.
    """

    name: str
    connected: bool = False
    connected_s: float = 0.0
    silent_s: float = 0.0
    latency_ms: float | None = None
    intent_age_steps: int | None = None
    holding: bool = False
    requests: int = 0
    held: int = 0
    missed: int = 0
    episodes: int = 0
    judged: int = 0
    successes: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def joined(self, other: "RobotRow") -> "RobotRow":
        """The row of a robot that two gateways know: the counts of both, the rest as the one sees it that it talks to."""
        now = max(self, other, key=lambda row: (row.connected, -row.silent_s))
        counts = ("requests", "held", "missed", "episodes", "judged", "successes")
        return replace(now, **{name: getattr(self, name) + getattr(other, name) for name in counts})

    def to_json(self) -> Json:
        """The row as the page reads it; `success_rate` is None as long as no success was reported."""
        return {**vars(self), "success_rate": _ratio(self.successes, self.judged)}


LEVEL_FIGURES = {
    "call_ms": ("call_s", 1000),
    "intent_ready_ms": ("intent_ready_s", 1000),
    "batch_size": ("call_batch", 1),
    "queue": ("queue", 1),
    "intent_age_steps": ("intent_age_steps", 1),
    "intent_age_s": ("intent_age_s", 1),
    "replan_share": ("replan_share", 1),
    "replan_difference": ("replan_difference", 1),
}
"""What the page shows of a level: the measure and its scale."""


@dataclass(frozen=True, kw_only=True)
class FleetSnapshot:
    """What gateways measured: over the last `WINDOW_S` seconds, over the last `RECENT_S`, and since they started.

    Attributes:
        time: seconds since 1970.
        gateways: how many this speaks of.
        robots: those connected, and those that left within the last minute.
        levels: of the policy, slow to fast.
        window: named as in `metrics.MEASURES` and `LEVEL_MEASURES`; and 1 for each reply that was `held` or `missed`.
        recent: the same of the last `RECENT_S`.
        refused: refused requests by reason, since the start.
        episodes: ended episodes by outcome (`success`, `failure`, `unknown`), since the start.
        margins: by level, how well it keeps up; of several gateways the least.
    """

    time: float
    gateways: int = 1
    robots: Sequence[RobotRow] = ()
    levels: Sequence[str] = ()
    window: Measured = field(default_factory=dict)
    recent: Measured = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    episodes: Counter[str] = field(default_factory=Counter)
    margins: Mapping[str, Margin] = field(default_factory=dict)

    @classmethod
    def merged(cls, snapshots: Iterable["FleetSnapshot"], time: float) -> "FleetSnapshot":
        """The fleet's, from those of its gateways; a robot that several of them know is one robot."""
        parts = list(snapshots)
        return cls(
            time=time,
            gateways=sum(part.gateways for part in parts),
            robots=tuple(_merged(({row.name: row} for part in parts for row in part.robots), RobotRow.joined).values()),
            levels=tuple(dict.fromkeys(level for part in parts for level in part.levels)),
            window=_merged((part.window for part in parts), operator.add),
            recent=_merged((part.recent for part in parts), operator.add),
            refused=sum((part.refused for part in parts), Counter()),
            episodes=sum((part.episodes for part in parts), Counter()),
            margins=_merged((part.margins for part in parts), lambda *both: min(both, key=lambda found: found.margin_steps)),
        )

    def summary(self, measure: str, level: str = REQUESTS, scale: float = 1.0) -> Json:
        """Of the window."""
        return summary(self.window.get((level, measure), {}), scale)

    def point(self) -> Json:
        """The page's curves at this moment: latencies in milliseconds, ages in control steps, requests per second."""

        def now(measure: str, level: str = REQUESTS, scale: float = 1.0) -> Json:
            return summary(self.recent.get((level, measure), {}), scale)

        def curves(level: str) -> Json:
            return {"call_p50_ms": now("call_s", level, 1000)["p50"], "intent_age_p50": now("intent_age_steps", level)["p50"]}

        latency = now("latency_s", scale=1000)
        return {
            "latency_p50_ms": latency["p50"],
            "latency_p99_ms": latency["p99"],
            "requests_per_s": latency["count"] / RECENT_S,
            "levels": {level: curves(level) for level in self.levels},
        }

    def to_json(self) -> Json:
        """The content of `fleet.json`, strict JSON values only; lists at most `LISTED_ROBOTS` robots."""
        rows = sorted(self.robots, key=lambda row: (not row.connected, _natural(row.name)))
        latency, successes = self.summary("latency_s", scale=1000), self.episodes["success"]
        judged = successes + self.episodes["failure"]
        shares = {name: self.summary(name)["count"] for name in ("held", "missed")}
        return {
            "time": self.time,
            "window_s": WINDOW_S,
            "gateways": self.gateways,
            "robots_connected": sum(row.connected for row in rows),
            "robots": [row.to_json() for row in rows[:LISTED_ROBOTS]],
            "robots_not_listed": max(0, len(rows) - LISTED_ROBOTS),
            "requests_per_s": self.point()["requests_per_s"],
            "latency_ms": latency,
            "batch_size": self.summary("batch_size"),
            "levels": [
                {"name": level, "margin": _said(self.margins.get(level))}
                | {figure: self.summary(measure, level, scale) for figure, (measure, scale) in LEVEL_FIGURES.items()}
                for level in self.levels
            ],
            **{name: {"count": count, "share": _ratio(count, latency["count"])} for name, count in shares.items()},
            "refused": dict(self.refused),
            "episodes": {
                "ended": self.episodes.total(),
                "judged": judged,
                "successes": successes,
                "success_rate": _ratio(successes, judged),
            },
        }


class FleetAggregator:
    """The latest snapshot of every gateway replica, and the curves of the last minutes. An actor's class, plain Python."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._latest: dict[str, tuple[float, FleetSnapshot]] = {}
        self._history: deque[tuple[float, Json]] = deque(maxlen=HISTORY_S)
        self._next_point = clock()

    def report(self, gateway: str, snapshot: FleetSnapshot) -> None:
        """A gateway's snapshot replaces its last one; about one call a second and gateway."""
        now = self._clock()
        self._latest[gateway] = (now, snapshot)
        if now >= self._next_point:
            self._next_point = now + 0.9
            self._history.append((now, self._fleet().point()))

    def fleet(self) -> Json:
        """The content of `fleet.json`: `FleetSnapshot.to_json` of the whole fleet, and `history`, a point per second."""
        now = self._clock()
        history = [{"seconds_ago": round(now - at, 2), **point} for at, point in self._history]
        return {**self._fleet().to_json(), "history": history}

    def _fleet(self) -> FleetSnapshot:
        now = self._clock()
        self._latest = {name: known for name, known in self._latest.items() if now - known[0] < SILENT_S}
        return FleetSnapshot.merged((snapshot for _, snapshot in self._latest.values()), time=time.time())


def _merged[V](parts: Iterable[Mapping[Any, V]], join: Callable[[V, V], V]) -> dict[Any, V]:
    merged: dict[Any, V] = {}
    for key, value in (item for part in parts for item in part.items()):
        merged[key] = join(merged[key], value) if key in merged else value
    return merged


def _said(margin: Margin | None) -> Json | None:
    return None if margin is None else {"steps": margin.margin_steps, "covers": margin.covers, "text": margin.text}


def _ratio(count: int, of: int) -> float | None:
    return count / of if of else None


def _natural(name: str) -> tuple[str, int, str]:
    """`robot-2` before `robot-10`."""
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :]
    return stem, int(digits[:18]) if digits.isascii() and digits else -1, name
