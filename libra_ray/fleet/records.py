"""What a fleet met at an endpoint, summed up: as the table shows it and its JSON holds it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from libra_ray.stats.intervals import Percentiles


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Deadlines that were due, and those at which no chunk was there; `share` is None where none was due."""

    due: int
    missed: int
    share: float | None


@dataclass(frozen=True, kw_only=True)
class SuccessRate:
    """Finished episodes, the share of successful ones, and Wilson's interval of it; None where none was finished."""

    episodes: int
    successes: int
    rate: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Success(SuccessRate):
    """Over all tasks, and of each."""

    tasks: Mapping[str, SuccessRate] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Rates, percentiles and counts of what happened in a span of time.

    Attributes:
        robots: those that were answered.
        latency_ms: from sending to the decoded answer.
        intent_age_steps: of the answers, as the server counts it, as is `intent_age_ms`.
        held_replies: answers of safe actions; `held_actions`: those executed for want of fresh ones;
            `awaited_actions`: those of them before an episode's first answer, which waits for every level.
        mean_batch: robots that the server computed together.
        wrong_robot: answers that were another robot's.
        errors: kind -> how many; `error_examples`: the first text of each kind.
        driver_lateness_ms: how much later than due the driver itself came to send.
    """

    seconds: float
    robots: int
    chunk_requests_per_s: float
    actions_per_s: float
    latency_ms: Percentiles
    deadlines: Deadlines
    intent_age_steps: Percentiles
    intent_age_ms: Percentiles
    held_replies: int
    held_actions: int
    awaited_actions: int
    mean_batch: float | None
    wrong_robot: int
    errors: Mapping[str, int]
    error_examples: Mapping[str, str]
    reconnects: int
    success: Success
    driver_lateness_ms: Percentiles


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The same in short, of a span that begins at `at_s`: what a plot over time shows."""

    at_s: float
    chunk_requests_per_s: float
    latency_ms: Percentiles
    intent_age_steps: Percentiles
    held_replies: int
    due: int
    missed: int
    errors: int


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the fleet asked for; `control_hz` is None of stub robots."""

    control_hz: float | None
    chunk_requests_hz_per_robot: float
