"""What a gateway saw of its robots of late, as a value: snapshots of several gateways add up to that of the fleet."""

import math
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
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
_MANTISSA = 128


def rounded(value: float) -> float:
    """The value to within 0.8 %, so that few different ones remain; zero and whole numbers up to 128 stay what they are."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * _MANTISSA) / _MANTISSA, exponent)


class SlidingCounts[K: Hashable]:
    """Counts per key over the last seconds, in slices of one second.

    Attributes:
        total: counts over the whole window, the slice that still fills included.
    """

    def __init__(self, seconds: int = WINDOW_S) -> None:
        self.total: Counter[K] = Counter()
        self._slices: deque[Counter[K]] = deque([Counter() for _ in range(seconds)])

    def add(self, key: K) -> None:
        """Count one."""
        self._slices[-1][key] += 1
        self.total[key] += 1

    def advance(self, seconds: int) -> None:
        """Begin a new slice, `seconds` after the one that now ends; what falls out of the window is forgotten."""
        for _ in range(min(seconds, len(self._slices))):
            for key, count in self._slices.popleft().items():
                self.total[key] -= count
                if not self.total[key]:
                    del self.total[key]
            self._slices.append(Counter())

    def recent(self, seconds: int = RECENT_S) -> Counter[K]:
        """Counts over the last `seconds` whole slices; the one that still fills is left out."""
        return sum(list(self._slices)[-1 - seconds : -1], Counter())


def summary(counts: Mapping[float, int], scale: float = 1.0) -> Json:
    """`count`, and `p50`, `p95`, `p99` (nearest rank), `mean` and `max` times `scale`; None where nothing was seen.

    Args:
        counts: how often each (rounded) value was seen.
        scale: of the values.
    """
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


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Counted values by their names in `metrics`: over the last `WINDOW_S` seconds, and over the last `RECENT_S`."""

    window: Mapping[str, Counter[float]] = field(default_factory=dict)
    recent: Mapping[str, Counter[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, counts: Mapping[str, SlidingCounts[float]]) -> "Measures":
        """What was counted so far."""
        return cls(
            window={name: Counter(counted.total) for name, counted in counts.items()},
            recent={name: counted.recent() for name, counted in counts.items()},
        )

    def __add__(self, other: "Measures") -> "Measures":
        """Both together."""
        return Measures(window=_added([self.window, other.window]), recent=_added([self.recent, other.recent]))

    def summary(self, name: str, scale: float = 1.0) -> Json:
        """Of the window."""
        return summary(self.window.get(name, {}), scale)

    def now(self, name: str, scale: float = 1.0) -> Json:
        """The summary of the last seconds."""
        return summary(self.recent.get(name, {}), scale)


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
        return {**vars(self), "success_rate": self.successes / self.judged if self.judged else None}


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
        measures: of requests, named as in `metrics.MEASURES`.
        levels: of the policy's levels, slow to fast, named as in `metrics.LEVEL_MEASURES`.
        events: replies that were `held` or `missed` their deadline over the window.
        refused: refused requests by reason, since the start.
        episodes: ended episodes by outcome (`success`, `failure`, `unknown`), since the start.
        margins: by level, how well it keeps up; of several gateways the least.
    """

    time: float
    gateways: int = 1
    robots: Sequence[RobotRow] = ()
    measures: Measures = field(default_factory=Measures)
    levels: Mapping[str, Measures] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    episodes: Mapping[str, int] = field(default_factory=dict)
    margins: Mapping[str, Margin] = field(default_factory=dict)

    @classmethod
    def merged(cls, snapshots: Iterable["FleetSnapshot"], time: float) -> "FleetSnapshot":
        """The fleet's, from those of its gateways; a robot that several of them know is one robot."""
        parts = list(snapshots)
        robots: dict[str, RobotRow] = {}
        for row in (row for part in parts for row in part.robots):
            robots[row.name] = robots[row.name].joined(row) if row.name in robots else row
        return cls(
            time=time,
            gateways=sum(part.gateways for part in parts),
            robots=tuple(robots.values()),
            measures=sum((part.measures for part in parts), Measures()),
            levels=_added(part.levels for part in parts),
            events=sum((Counter(part.events) for part in parts), Counter()),
            refused=sum((Counter(part.refused) for part in parts), Counter()),
            episodes=sum((Counter(part.episodes) for part in parts), Counter()),
            margins=_least(part.margins for part in parts),
        )

    def point(self) -> Json:
        """The page's curves at this moment: latencies in milliseconds, ages in control steps, requests per second."""
        latency = self.measures.now("latency_s", 1000)
        return {
            "latency_p50_ms": latency["p50"],
            "latency_p99_ms": latency["p99"],
            "requests_per_s": latency["count"] / RECENT_S,
            "levels": {
                name: {"call_p50_ms": level.now("call_s", 1000)["p50"], "intent_age_p50": level.now("intent_age_steps")["p50"]}
                for name, level in self.levels.items()
            },
        }

    def to_json(self) -> Json:
        """The content of `fleet.json`, strict JSON values only; lists at most `LISTED_ROBOTS` robots."""
        rows = sorted(self.robots, key=lambda row: (not row.connected, _natural(row.name)))
        latency = self.measures.summary("latency_s", 1000)
        judged = self.episodes.get("success", 0) + self.episodes.get("failure", 0)
        return {
            "time": self.time,
            "window_s": WINDOW_S,
            "gateways": self.gateways,
            "robots_connected": sum(row.connected for row in rows),
            "robots": [row.to_json() for row in rows[:LISTED_ROBOTS]],
            "robots_not_listed": max(0, len(rows) - LISTED_ROBOTS),
            "requests_per_s": self.point()["requests_per_s"],
            "latency_ms": latency,
            "batch_size": self.measures.summary("batch_size"),
            "levels": [
                {"name": name, "margin": _said(self.margins.get(name))}
                | {figure: level.summary(*of) for figure, of in LEVEL_FIGURES.items()}
                for name, level in self.levels.items()
            ],
            "held": _share(self.events.get("held", 0), latency["count"]),
            "missed": _share(self.events.get("missed", 0), latency["count"]),
            "refused": dict(self.refused),
            "episodes": {
                "ended": sum(self.episodes.values()),
                "judged": judged,
                "successes": self.episodes.get("success", 0),
                "success_rate": self.episodes.get("success", 0) / judged if judged else None,
            },
        }


def _added[T: (Counter[float], Measures)](parts: Iterable[Mapping[str, T]]) -> dict[str, T]:
    added: dict[str, T] = {}
    for part in parts:
        for name, found in part.items():
            added[name] = added[name] + found if name in added else found
    return added


def _least(parts: Iterable[Mapping[str, Margin]]) -> dict[str, Margin]:
    least: dict[str, Margin] = {}
    for name, margin in (item for part in parts for item in part.items()):
        least[name] = min(least.get(name, margin), margin, key=lambda found: found.margin_steps)
    return least


def _said(margin: Margin | None) -> Json | None:
    return None if margin is None else {"steps": margin.margin_steps, "covers": margin.covers, "text": margin.text}


def _share(count: int, of: int) -> Json:
    return {"count": count, "share": count / of if of else None}


def _natural(name: str) -> tuple[str, int, str]:
    """`robot-2` before `robot-10`."""
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :]
    return stem, int(digits[:18]) if digits.isascii() and digits else -1, name
