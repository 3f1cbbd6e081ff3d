"""The metrics of serving, declared once: what registers them, the dashboard and its test read this table."""

from dataclasses import dataclass
from typing import Literal

_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
_AGES_STEPS = (1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0)
_AGES_S = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
_ROBOTS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)
_SHARES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
_DIFFERENCES = (0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
_WAITING = (0.5, *_ROBOTS)
"""A bucket of its own for an empty queue."""


@dataclass(frozen=True)
class Metric:
    """One metric; `label` is a label beside `deployment`, `boundaries` are a histogram's upper bucket bounds."""

    name: str
    description: str
    boundaries: tuple[float, ...] = ()
    label: str | None = None
    kind: Literal["histogram", "counter", "gauge"] = "histogram"


MEASURES = {
    "latency_s": Metric("libra_tick_latency_seconds", "From a request's arrival to its reply.", _SECONDS),
    "batch_size": Metric("libra_tick_batch_size", "Robots answered in the same call as the one that asked.", _ROBOTS),
}
"""Measured values of requests, by the name that telemetry uses for them."""

LEVEL_MEASURES = {
    "intent_age_steps": Metric("libra_intent_age_steps", "Control steps since an intent's picture.", _AGES_STEPS, "level"),
    "intent_age_s": Metric("libra_intent_age_seconds", "Time since an intent's picture.", _AGES_S, "level"),
    "intent_ready_s": Metric("libra_intent_latency_seconds", "From an intent's picture to the intent.", _SECONDS, "level"),
    "call_s": Metric("libra_call_seconds", "One batched call of a level, as the gateway sees it.", _SECONDS, "level"),
    "call_batch": Metric("libra_call_batch_size", "Robots per call of a level.", _ROBOTS, "level"),
    "queue": Metric("libra_call_queue", "Requests that wait while a call of a level is sent.", _WAITING, "level"),
    "replan_share": Metric("libra_replan_share", "Share of an intent in use that a fresh one changes.", _SHARES, "level"),
    "replan_difference": Metric(
        "libra_replan_difference", "Mean absolute difference of a fresh intent from the one in use.", _DIFFERENCES, "level"
    ),
}
"""Measured values of each level."""

EVENTS = {
    "answered": Metric("libra_answered_requests", "Replies, fresh and held.", kind="counter"),
    "missed": Metric("libra_deadline_misses", "Replies later than their control deadline.", kind="counter"),
    "held": Metric("libra_held_actions", "Replies that hold the last safe action.", kind="counter"),
    "refused": Metric("libra_refused_requests", "Refused requests.", label="reason", kind="counter"),
    "episodes": Metric("libra_episodes", "Ended episodes by outcome.", label="outcome", kind="counter"),
}
"""Counted events."""

MARGIN_STEPS = Metric(
    "libra_margin_steps", "Control steps that a level has to spare; below 0 it is too late.", label="level", kind="gauge"
)
ROBOTS_CONNECTED = Metric("libra_robots_connected", "Robots with an open connection.", kind="gauge")
