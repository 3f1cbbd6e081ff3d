"""Which settings of a checkpoint fit a budget, which of them none beats, and which one is proposed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from libra_ray.budget.records import BATCHES, GATEWAY, TRANSPORT, Candidate, LatencyModel
from libra_ray.config import ControlConfig
from libra_ray.control.margin import Latency, asked_every, margins
from libra_ray.control.robot import chunk_period
from libra_ray.types import Level

STEPS = (1, 2, 4, 8, 16, 32, 64)
"""Denoising steps that are considered, beside the checkpoint's own, up to twice as many."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a checkpoint.

    Attributes:
        budget_ms: per control decision, from picture to actions.
        control_hz: control steps per second.
        robots: that shall be served by one replica of each level and one gateway.
        control: the rule, and what robots commit to; `execute_steps` is what is sought.
        levels: of the policy, slow to fast.
        lengthened_by: see `libra_ray.model.registry.lengthening`.
        denoised: the level that denoises; empty where none does, and until a profile says it.
        trained_steps: denoising steps of the checkpoint's configuration; 0 where nothing is denoised.
        most_steps: that are still different ones.

    Raises:
        ValueError: a number that nothing could meet.
    """

    budget_ms: float
    control_hz: float
    robots: int
    control: ControlConfig
    levels: tuple[Level, ...]
    lengthened_by: Mapping[str, tuple[str, int]]
    denoised: str = ""
    trained_steps: int = 0
    most_steps: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        for option, value, kind in (("--hz", self.control_hz, "rate"), ("--ms", self.budget_ms, "time")):
            if not 0 < value < float("inf"):
                raise ValueError(f"{option} {value:g} is no {kind}; give a number above 0")
        if not 1 <= self.robots <= 100_000:
            raise ValueError(f"--robots {self.robots} must be at least 1 and at most 100000")

    @property
    def waits_for_all(self) -> bool:
        """Whether a decision waits for the levels above too, as under the rule `fifo` where an intent is used up."""
        return self.control.rule == "fifo"

    def denoising_steps(self) -> list[int]:
        """Those considered; 0 alone where nothing is denoised."""
        if not self.trained_steps:
            return [0]
        most = min(2 * self.trained_steps, self.most_steps)
        return sorted({steps for steps in STEPS if steps <= most} | {self.trained_steps})

    def execute_steps(self) -> list[int]:
        """Those considered: one, half a chunk, all of it, and what the checkpoint was configured for."""
        covers, committed = self.levels[-1].covers, self.control.committed_steps
        wanted = (1, covers // 2 or 1, covers, self.control.execute_steps)
        return sorted({chunk_period(steps, committed, covers) for steps in wanted})


def candidates(question: Question, models: Mapping[str, LatencyModel]) -> list[Candidate]:
    """Every combination that is considered, whether it fits or not: by denoising, then by execute steps."""
    return [
        _candidate(question, models, steps, executed)
        for steps in question.denoising_steps()
        for executed in question.execute_steps()
    ]


def with_front(found: Sequence[Candidate]) -> list[Candidate]:
    """The same, with the front marked among those that fit.

    Where success was measured it is over latency and success. Elsewhere it is over latency and settings: more denoising
    steps, fewer executed ones, and more robots count as better.
    """
    fit = [candidate for candidate in found if candidate.fits]
    measured = [candidate for candidate in fit if candidate.success is not None]
    among = measured or fit
    return [replace(c, front=c in among and not any(_beats(other, c) for other in among)) for c in found]


def proposed(found: Sequence[Candidate], question: Question) -> Candidate | None:
    """The best one that fits; None where none does.

    Where success was measured, the highest, then the fastest. Elsewhere the nearest to the checkpoint's own settings.
    """
    fit = [candidate for candidate in found if candidate.fits]
    measured = [candidate for candidate in fit if candidate.success is not None]
    if measured:
        return min(measured, key=lambda c: (-_rate(c), c.ms, -c.robots))
    own = chunk_period(question.control.execute_steps, question.control.committed_steps, question.levels[-1].covers)

    def far(c: Candidate) -> tuple[int, int, float]:
        return abs(c.denoising_steps - question.trained_steps), abs(c.execute_steps - own), c.ms

    return min(fit, key=far, default=None)


def least_chunks(question: Question, chosen: Candidate | None) -> int | None:
    """M, the chunks that a plan has to cover for a candidate's intents to be in time; None where nothing says so.

    That is where no setting lengthens a level above the last, or the rule waits for intents anyway.
    """
    if chosen is None or question.waits_for_all:
        return None
    needed = [
        -(-(level.covers - chosen.margin_steps[level.name]) // question.lengthened_by[level.name][1])
        for level in question.levels[:-1]
        if level.name in question.lengthened_by
    ]
    return max(needed, default=None)


def _beats(one: Candidate, other: Candidate) -> bool:
    """Whether it is better in one respect and worse in none."""
    mine, theirs = _goods(one), _goods(other)
    return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


def _goods(c: Candidate) -> tuple[float, ...]:
    """What is better the larger it is."""
    return (-c.ms, c.denoising_steps, -c.execute_steps, c.robots) if c.success is None else (-c.ms, c.success.rate)


def _rate(candidate: Candidate) -> float:
    return candidate.success.rate if candidate.success is not None else 0.0


@dataclass(frozen=True, kw_only=True)
class _Reckoned:
    """What a batch size comes to."""

    ms: float
    late: dict[str, int]
    margin: dict[str, int]
    remedies: list[str]
    robots: int


def _candidate(question: Question, models: Mapping[str, LatencyModel], steps: int, executed: int) -> Candidate:
    """With the smallest batch by which all robots are served; else with the one that serves most."""
    sizes = sorted({batch for batch in BATCHES if batch <= question.robots} | {min(question.robots, BATCHES[-1])})
    by_size = {batch: _reckoned(question, models, steps, executed, batch) for batch in sizes}
    batch = next((b for b, r in by_size.items() if r.robots >= question.robots), max(sizes, key=lambda b: by_size[b].robots))
    chosen = by_size[batch]
    every = [(b, _reckoned(question, models, steps, executed, b)) for b in BATCHES]
    most = [r.robots for b, r in every if r.ms <= question.budget_ms and not r.remedies and r.robots >= b]
    misses = [f"{chosen.ms:.3g} ms are over the budget"] if chosen.ms > question.budget_ms else []
    misses += chosen.remedies
    if chosen.robots < question.robots:
        misses.append(f"one replica serves {chosen.robots} of {question.robots} robots")
    return Candidate(
        denoising_steps=steps,
        execute_steps=executed,
        batch=batch,
        ms=chosen.ms,
        late_steps=chosen.late,
        margin_steps=chosen.margin,
        robots=chosen.robots,
        most_robots=max(most, default=0),
        misses=misses,
    )


def _reckoned(question: Question, models: Mapping[str, LatencyModel], steps: int, executed: int, batch: int) -> _Reckoned:
    *upper, last = question.levels
    control = replace(question.control, execute_steps=executed)
    denoising = {question.denoised: steps}
    own = {level.name: models[level.name].ms(batch, denoising.get(level.name, 0)) for level in question.levels}
    gateway = models[GATEWAY].ms(batch)
    way = gateway + models[TRANSPORT].ms(batch)
    until = {name: way + ms for name, ms in own.items()}
    if question.waits_for_all:
        until[last.name] = way + sum(own.values())
    latencies = {name: Latency(p50_ms=ms, p95_ms=ms, robots=batch) for name, ms in until.items()}
    found = margins(question.levels, latencies, question.control_hz, control, question.lengthened_by)
    counted = {last.name} if question.waits_for_all else set(until)
    remedies = [
        f"{m.level} is {-m.margin_steps} control steps late" + (f"; {m.remedy} would do" if m.remedy else "")
        for m in found
        if m.level in counted and m.margin_steps < 0
    ]
    late = {m.level: m.late_steps for m in found}
    every = asked_every(question.levels, late, control)
    # A batch of each level, and of the gateway, per so many milliseconds.
    busy = [(own[level.name], every[level.name]) for level in [*upper, last]] + [(gateway, every[last.name])]
    served = [batch * 1000 * asked / question.control_hz / max(ms, 1e-6) for ms, asked in busy]
    return _Reckoned(
        ms=until[last.name],
        late=late,
        margin={m.level: m.margin_steps for m in found if m.level in counted},
        remedies=remedies,
        robots=int(min(*served, 1e6)),
    )
