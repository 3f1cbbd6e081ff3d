"""When to start and end replicas: the planner by the age of intents, the refiner by missed deadlines, gateways by connections.

A policy sees what replicas report by `record_autoscaling_stats` and names a number; Serve applies the delays and the limits.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

LATE_INTENTS = 0.2
"""Share of requests that found their plan not renewed in time, above which one more planner is started."""
MISSED_DEADLINES = 0.02
"""Share of answers after their deadline, above which one more refiner is started."""
BUSY = 0.6
"""A replica is ended where the others would compute for less than this share of the time."""
CONNECTIONS = 64
"""Robots that one gateway should have."""


class Context(Protocol):
    """What Serve tells a policy, as far as it is used here."""

    current_num_replicas: int
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None


def by_intent_age(context: Context) -> tuple[int, dict[str, Any]]:
    """Planners wanted: one more where intents are not renewed in time."""
    return _by_pressure(context, LATE_INTENTS), {}


def by_deadline_misses(context: Context) -> tuple[int, dict[str, Any]]:
    """Refiners wanted: one more where answers miss their deadline, because they compute too long or queue."""
    return _by_pressure(context, MISSED_DEADLINES), {}


def by_connections(context: Context) -> tuple[int, dict[str, Any]]:
    """Gateways wanted: one per `CONNECTIONS` robots."""
    return max(1, math.ceil(sum(_metric(context, "connections")) / CONNECTIONS)), {}


def _by_pressure(context: Context, limit: float) -> int:
    now = max(1, context.current_num_replicas)
    pressure, busy = _metric(context, "pressure"), sum(_metric(context, "busy"))
    if max(pressure, default=0.0) > limit:
        return now + 1
    return now - 1 if now > 1 and busy < BUSY * (now - 1) else now


def _metric(context: Context, name: str) -> list[float]:
    return list((context.aggregated_metrics or {}).get(name, {}).values())
