"""When to start and end replicas: levels by late intents, the last by missed deadlines, gateways by connections.

A policy sees what replicas report by `record_autoscaling_stats` and names a number; Serve applies the delays and the limits.
A replica that starts takes processors from those that work, and makes them late: nothing is decided before it runs, and before
the measures of that time are over.
"""

import math
import time
from typing import Any

from ray.serve.config import AutoscalingContext

LATE_INTENTS = 0.2
"""Share of requests that found a level's intent not renewed in time, above which one more replica of it is started."""
MISSED_DEADLINES = 0.02
"""Share of answers after their deadline, above which one more replica of the last level is started."""
BUSY = 0.6
"""A replica is ended where the others would compute for less than this share of the time."""
CONNECTIONS = 64
"""Robots that one gateway should have."""
METRICS_S = 2.0
"""Between two reports of a replica."""
LOOK_BACK_S = 3 * METRICS_S
"""How far back the reports go that a decision rests on."""
_SETTLED_AT = "settled_at"


def by_late_intents(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Replicas wanted of a level above the last: one more where its intents are not renewed in time."""
    return _by_late_share(context, LATE_INTENTS)


def by_missed_deadlines(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Replicas wanted of the last level: one more where answers miss their deadline, because they compute too long or queue."""
    return _by_late_share(context, MISSED_DEADLINES)


def by_connections(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Gateways wanted: one per `CONNECTIONS` robots."""
    return max(1, math.ceil(sum(_metric(context, "connections")) / CONNECTIONS)), {}


def _by_late_share(context: AutoscalingContext, limit: float) -> tuple[int, dict[str, Any]]:
    wanted = max(1, context.target_num_replicas)
    if context.current_num_replicas != wanted:
        return wanted, {}
    now = time.time() if context.current_time is None else context.current_time
    # A clock that was set back begins the wait anew, rather than make it as long as it was set back.
    state = {_SETTLED_AT: min(now, context.policy_state.get(_SETTLED_AT, now))}
    if now - state[_SETTLED_AT] < LOOK_BACK_S:
        return wanted, state
    late, busy = _metric(context, "late_share"), sum(_metric(context, "busy"))
    if max(late, default=0.0) > limit:
        wanted += 1
    elif wanted > 1 and busy < BUSY * (wanted - 1):
        wanted -= 1
    return wanted, state


def _metric(context: AutoscalingContext, name: str) -> list[float]:
    return list((context.aggregated_metrics or {}).get(name, {}).values())
