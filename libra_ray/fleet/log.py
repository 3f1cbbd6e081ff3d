"""What a fleet of robots met at an endpoint: every answer, miss and error with its time, and what they come to."""

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from libra_ray.client.protocol import Reply
from libra_ray.fleet.records import Deadlines, Moment, Success, SuccessRate, Summary
from libra_ray.stats.intervals import percentiles, wilson

OF_LEVEL = "_ms"
"""Ends the names of levels in `Reply.server_timing`."""
KEPT_LATENCIES = 10_000
"""Of each level; of more, evenly as many."""


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One answered request.

    Attributes:
        at_s: when it was sent, on the log's clock.
        latency_s: from sending to the decoded answer, as the robot sees it.
        intent_age_steps: of the answer, as the server counts it; None like the others where the server does not say.
        held: the server sent safe actions, not fresh ones.
        batch: robots that the server computed together.
        intents_ms: level above the last -> from the picture to the intent in use.
        begins: it began an episode, and so waited for every level.
    """

    robot: str
    at_s: float
    latency_s: float
    intent_age_steps: int | None = None
    intent_age_ms: float | None = None
    held: bool = False
    batch: float | None = None
    intents_ms: Mapping[str, float] = field(default_factory=dict)
    begins: bool = False

    @classmethod
    def of(
        cls, robot: str, at_s: float, latency_s: float, reply: Reply, levels: Collection[str] = (), *, begins: bool = False
    ) -> "RequestRecord":
        """The record of a reply; `levels` are those above the last."""
        return cls(
            robot=robot,
            at_s=at_s,
            latency_s=latency_s,
            intent_age_steps=reply.intent_age_steps,
            intent_age_ms=reply.intent_age_ms,
            held=reply.held,
            begins=begins,
            batch=reply.server_timing.get("batch"),
            intents_ms={
                name.removesuffix(OF_LEVEL): ms
                for name, ms in reply.server_timing.items()
                if name.removesuffix(OF_LEVEL) in levels
            },
        )


@dataclass(frozen=True, kw_only=True)
class FinishedEpisode:
    """One finished episode of one robot."""

    task: str
    success: bool
    at_s: float


@dataclass
class DriveLog:
    """Times are seconds since the log was made.

    Attributes:
        met: deadlines at which the chunk was there, by time; `missed`: those at which it was not.
        lateness: (due, how much later the driver itself came to send), in seconds: what is not the server's fault.
        fresh: (time, actions) executed from fresh chunks; `held`: executed for want of one; `awaited`: those of them before an
            episode's first one.
        errors: (time, kind); `examples` keeps the first text of each kind.
        levels: of the policy, slow to fast, where the server says.
    """

    answers: list[RequestRecord] = field(default_factory=list)
    met: list[float] = field(default_factory=list)
    missed: list[float] = field(default_factory=list)
    wrong_robot: list[float] = field(default_factory=list)
    errors: list[tuple[float, str]] = field(default_factory=list)
    examples: dict[str, str] = field(default_factory=dict)
    lateness: list[tuple[float, float]] = field(default_factory=list)
    fresh: list[tuple[float, int]] = field(default_factory=list)
    held: list[tuple[float, int]] = field(default_factory=list)
    awaited: list[tuple[float, int]] = field(default_factory=list)
    episodes: list[FinishedEpisode] = field(default_factory=list)
    reconnects: int = 0
    levels: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Start the clock."""
        self._zero = time.perf_counter()

    def now(self) -> float:
        """Seconds since the log was made."""
        return time.perf_counter() - self._zero

    def failed(self, kind: str, text: str) -> None:
        """Count an error of a kind."""
        self.errors.append((self.now(), kind))
        self.examples.setdefault(kind, " ".join(text.split())[:300])

    def executed(self, actions: int, *, fresh: bool) -> None:
        """Count executed actions."""
        (self.fresh if fresh else self.held).append((self.now(), actions))

    def summary(self, *, after_s: float = 0.0, until_s: float | None = None) -> Summary:
        """What happened in a span of time; percentiles are None where there is nothing.

        Args:
            after_s: leaves out the time before, in which everything warmed up.
        """
        until_s = self.now() if until_s is None else until_s
        seconds = max(until_s - after_s, 1e-9)

        def within(at_s: float) -> bool:
            return after_s <= at_s < until_s

        # An answer counts when it comes: one that was sent before the span may come in it, and the other way round.
        answers = [a for a in self.answers if within(a.at_s + a.latency_s)]
        met, missed = sum(map(within, self.met)), sum(map(within, self.missed))
        fresh, held, awaited = (sum(n for at, n in of if within(at)) for of in (self.fresh, self.held, self.awaited))
        batches = [a.batch for a in answers if a.batch]
        return Summary(
            seconds=seconds,
            robots=len({a.robot for a in answers}),
            chunk_requests_per_s=len(answers) / seconds,
            actions_per_s=fresh / seconds,
            latency_ms=percentiles([1e3 * a.latency_s for a in answers]),
            deadlines=Deadlines(due=met + missed, missed=missed, share=missed / (met + missed) if met + missed else None),
            intent_age_steps=percentiles([a.intent_age_steps for a in answers if a.intent_age_steps is not None]),
            intent_age_ms=percentiles([a.intent_age_ms for a in answers if a.intent_age_ms is not None]),
            held_replies=sum(a.held for a in answers),
            held_actions=held,
            awaited_actions=awaited,
            mean_batch=float(np.mean(batches)) if batches else None,
            wrong_robot=sum(map(within, self.wrong_robot)),
            errors=dict(Counter(kind for at, kind in self.errors if within(at))),
            error_examples=self.examples,
            reconnects=self.reconnects,
            success=_success([t for t in self.episodes if within(t.at_s)]),
            driver_lateness_ms=percentiles([1e3 * late for at, late in self.lateness if within(at)]),
        )

    def level_latencies_ms(self, *, after_s: float = 0.0) -> dict[str, list[float]]:
        """Level -> from every picture to its answer: of the last level as robots see it, of others as the server does."""
        answers = [a for a in self.answers if a.at_s >= after_s]
        found: dict[str, list[float]] = {name: [] for name in self.levels}
        known: dict[tuple[str, str], float] = {}
        for answer in answers:
            for name, ms in answer.intents_ms.items():
                # Every reply under an intent names it; it was waited for once.
                if known.get((answer.robot, name)) != ms:
                    found[name].append(ms)
                known[answer.robot, name] = ms
        for name in self.levels[-1:]:
            found[name] = [1e3 * a.latency_s for a in answers if not a.begins]
        return {name: _thinned(values) for name, values in found.items()}

    def timeline(self, seconds: float = 1.0) -> list[Moment]:
        """The same in short, for every `seconds` from the beginning."""
        count = int(np.ceil(max(self.now(), 1e-9) / seconds))

        def bins(times: Sequence[float]) -> list[int]:
            return np.histogram(times, count, (0, count * seconds))[0].tolist()

        came: list[list[RequestRecord]] = [[] for _ in range(count)]
        for answer in self.answers:
            came[min(int((answer.at_s + answer.latency_s) / seconds), count - 1)].append(answer)
        met, missed, errors = bins(self.met), bins(self.missed), bins([at for at, _ in self.errors])
        return [
            Moment(
                at_s=i * seconds,
                chunk_requests_per_s=len(answers) / seconds,
                latency_ms=percentiles([1e3 * a.latency_s for a in answers]),
                intent_age_steps=percentiles([a.intent_age_steps for a in answers if a.intent_age_steps is not None]),
                held_replies=sum(a.held for a in answers),
                due=met[i] + missed[i],
                missed=missed[i],
                errors=errors[i],
            )
            for i, answers in enumerate(came)
        ]


def _thinned(values: list[float]) -> list[float]:
    if len(values) <= KEPT_LATENCIES:
        return values
    return [values[i] for i in np.linspace(0, len(values) - 1, KEPT_LATENCIES).astype(int)]


def _success(episodes: Sequence[FinishedEpisode]) -> Success:
    tasks = dict.fromkeys(t.task for t in episodes)
    by_task = {task: _rate([t for t in episodes if t.task == task]) for task in tasks}
    return Success(**vars(_rate(episodes)), tasks=by_task)


def _rate(chosen: Sequence[FinishedEpisode]) -> SuccessRate:
    successes, episodes = sum(t.success for t in chosen), len(chosen)
    interval = wilson(successes, episodes)
    return SuccessRate(
        episodes=episodes,
        successes=successes,
        rate=successes / episodes if episodes else None,
        interval=(interval.low, interval.high) if interval else None,
    )
