"""Whether intents and chunks come in time: what a level's latency leaves of the steps that its answers cover.

The margin of a level above the last: the control steps of an intent that are left when the next one is in use. Intents are
asked for, and taken up, where a chunk is asked for, so that both count in whole chunks; under `fifo` each is asked for when the
one before is used up. Below 0 robots go on for as many steps without one.

The margin of the last level: what is left of the time that its answer may take. That is what is executed of the chunk before,
or with `committed_steps` those.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from libra_ray.config import ControlConfig
from libra_ray.control.delays import Delays
from libra_ray.control.robot import chunk_period
from libra_ray.types import Intent, Level, Observation, Policy

CALLS, FEWEST_CALLS, LONGEST_MS = 15, 3, 1000.0
"""A level is measured so often, or for so long, but at least a few times."""
SPEAKS_FOR = 95
"""The percentile of the latencies that a margin goes by."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds from a picture to the answer of a level.

    Attributes:
        robots: whose latency that is: robots answered in the same call, their mean.
        injected_steps: control steps that come on top, in simulated time.
    """

    p50_ms: float
    p95_ms: float
    robots: float = 1.0
    injected_steps: int = 0

    @classmethod
    def of(cls, ms: Sequence[float], robots: float = 1.0, injected_steps: int = 0) -> "Latency":
        """That of measured calls, at least one."""
        p50, p95 = map(float, np.percentile(ms, (50, SPEAKS_FOR)))
        return cls(p50_ms=p50, p95_ms=p95, robots=robots, injected_steps=injected_steps)

    def steps(self, control_hz: float) -> int:
        """Whole control steps: an answer is usable at the first step after it came."""
        return self.injected_steps + math.ceil(round(self.p95_ms * control_hz / 1000, 6))


@dataclass(frozen=True, kw_only=True)
class Margin:
    """How well one level keeps up.

    Attributes:
        robots: answered in the measured calls, their mean.
        late_steps: control steps until an answer is usable.
        covers: control steps that one covers.
        margin_steps: see above; below 0 it comes too late.
        found: in words.
        remedy: what would do; empty where it is in time.
    """

    level: str
    p50_ms: float
    p95_ms: float
    robots: float
    control_hz: float
    late_steps: int
    covers: int
    margin_steps: int
    found: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """All of it in one line."""
        return f"{self.found}; {self.remedy} would do" if self.remedy else self.found


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """How a level's intents follow one another, in control steps from the picture behind one.

    Attributes:
        asked: when the next one is asked for.
        replaced: when that is in use; so much an intent has to cover.
    """

    asked: int
    replaced: int


def measure(policy: Policy, seen: Observation, clock: Callable[[], float] = perf_counter) -> dict[str, Latency]:
    """The latency of every level on this machine for one robot, by name; the first call of each is not counted.

    Args:
        policy: whose levels are asked one after the other, each with the intent of the one that it reads.
        seen: what the robot sees.
        clock: seconds.
    """
    intents: dict[str | None, Intent | None] = {None: None}
    found = {}
    for level in policy.levels:
        above = [intents[level.reads]]
        [answer] = policy.infer(level.name, [seen], above)
        ms: list[float] = []
        while len(ms) < CALLS and (len(ms) < FEWEST_CALLS or sum(ms) < LONGEST_MS):
            began = clock()
            policy.infer(level.name, [seen], above)
            ms.append(1000 * (clock() - began))
        if isinstance(answer, Intent):
            intents[level.name] = answer
        found[level.name] = Latency.of(ms)
    return found


def injected_steps(delays: Delays, levels: Sequence[Level]) -> dict[str, int]:
    """How late each level is made in simulated time, by name: as set, or by the measured latencies that are drawn from."""
    fixed = {level.name: delays.config.intent_steps for level in levels} | {levels[-1].name: delays.config.chunk_steps}
    return fixed | {name: math.ceil(np.percentile(steps, SPEAKS_FOR)) for name, steps in delays.measured.items()}


def margins(
    levels: Sequence[Level],
    latencies: Mapping[str, Latency],
    control_hz: float,
    control: ControlConfig,
    lengthened_by: Mapping[str, tuple[str, int]] | None = None,
    *,
    section: str = "control.",
) -> list[Margin]:
    """The margin of every level that was measured, slow to fast.

    Args:
        levels: of the policy.
        latencies: by the level's name; those never measured may be left out.
        control_hz: control steps per second.
        control: when levels are asked.
        lengthened_by: by the level's name the setting that lengthens its answers, and the steps that one more of it adds.
        section: begins the names of the settings of `control` where the reader gives them.
    """
    last, found = levels[-1], {}
    period = chunk_period(control.execute_steps, control.committed_steps, last.covers)
    late = {name: latency.steps(control_hz) for name, latency in latencies.items()}
    settings = lengthened_by or {}
    if last.name in late:
        found[last.name] = _of_chunk(last, late[last.name], control, period, settings.get(last.name), section)
    now, by_overlap = (_cycles(levels, late, each) for each in (control, replace(control, rule="overlap")))
    for level in (level for level in levels[:-1] if level.name in late):
        needed = by_overlap[level.name].replaced
        longer = replace(level, covers=max(level.covers, needed))
        then = _cycles([longer if each is level else each for each in levels], late, control)[level.name]
        remedies = [f"{section}rule=overlap"] if longer.covers < then.replaced else []
        if level.covers < needed:
            remedies.append(_length(settings.get(level.name), needed, "intents"))
        found[level.name] = _of_intent(level, control.rule, now[level.name], " with ".join(remedies), section)
    return [_told(v, latencies[v.name], control_hz, late[v.name], *found[v.name]) for v in levels if v.name in found]


def asked_every(levels: Sequence[Level], late: Mapping[str, int], control: ControlConfig) -> dict[str, int]:
    """Control steps from one request of a robot to a level to the next, by its name, where answers come in time.

    Args:
        levels: of the policy.
        late: control steps until an answer is usable, by the level's name; what is left out is not late.
        control: when levels are asked.
    """
    cycles = _cycles(levels, late, control)
    return {levels[-1].name: _chunks_every(levels[-1], late, control)} | {name: cycle.asked for name, cycle in cycles.items()}


def _cycles(levels: Sequence[Level], late: Mapping[str, int], control: ControlConfig) -> dict[str, Cycle]:
    """How the intents of every level above the last follow one another, by its name; see `asked_every`."""
    last, found = levels[-1], dict[str, Cycle]()
    period = chunk_period(control.execute_steps, control.committed_steps, last.covers)
    for level in reversed(levels[:-1]):
        reader, steps = _reader(levels, level), late.get(level.name, 0)
        every = _chunks_every(last, late, control) if reader is last else found[reader.name].asked
        found[level.name] = cycle_of(level.covers, steps, every, period, control, above_last=reader is last)
    return found


def _chunks_every(last: Level, late: Mapping[str, int], control: ControlConfig) -> int:
    """Control steps from one request for a chunk to the next: none is asked for while another one is under way."""
    return max(chunk_period(control.execute_steps, control.committed_steps, last.covers), late.get(last.name, 0))


def _reader(levels: Sequence[Level], level: Level) -> Level:
    """Who reads a level's intents."""
    return next(below for below in levels if below.reads == level.name)


def cycle_of(covers: int, late: int, every: int, period: int, control: ControlConfig, *, above_last: bool) -> Cycle:
    """How intents follow one another under a rule.

    Args:
        covers: control steps of an intent.
        late: control steps until it is usable.
        every: between two requests to the level that reads it.
        period: control steps from one request for a chunk to the next, where it comes in time.
        control: the rule, and the steps that a chunk is executed beyond its own time.
        above_last: whether the last level reads it.
    """
    if control.rule == "fifo" and not above_last:
        # Asked as soon as it is used up, whether its reader is asked then or not, which waits for it.
        every = period
    taken_up = every * -(-late // every)
    if control.rule == "overlap":
        first = every
    elif control.rule == "event":
        # The first request at which it ends before the chunk does that the next one could be in use for.
        comes_in = max(period, period * -(-late // period))
        first = every * ((covers - period - comes_in - control.committed_steps) // every + 1)
    else:
        # The first request at which it does not cover all that is done until the next one.
        first = every * ((covers - (period if above_last else 1)) // every + 1)
    asked = max(first, taken_up, every)
    return Cycle(asked=asked, replaced=asked + taken_up + (control.committed_steps if above_last else 0))


type Verdict = tuple[int, str, str]
"""The margin, what it means, and what would do."""


def _of_intent(level: Level, rule: str, cycle: Cycle, remedy: str, section: str) -> Verdict:
    margin = level.covers - cycle.replaced
    if margin >= 0:
        return margin, f"of the {_steps(level.covers)} of an intent {margin} are left when the next one is in use", ""
    if rule == "fifo":
        return margin, f"{section}rule=fifo asks when an intent is used up, and then {_steps(-margin)} pass without one", remedy
    return margin, f"an intent of {_steps(level.covers)} is used up {_steps(-margin)} before the next one is in use", remedy


def _of_chunk(
    level: Level, late: int, control: ControlConfig, period: int, setting: tuple[str, int] | None, section: str
) -> Verdict:
    committed = control.committed_steps
    margin = (committed or period) - late
    lasts = f"robots go on for {_steps(committed)} meanwhile" if committed else f"a chunk lasts for {_steps(period)}"
    if margin >= 0:
        return margin, lasts, ""
    needed = 2 * late if committed else late
    remedies = [_length(setting, needed, "chunks")] if level.covers < needed else []
    if committed:
        remedies.append(f"{section}committed_steps={late}")
    elif 0 < control.execute_steps < late:
        remedies.append(f"{section}execute_steps={late}")
    return margin, f"{lasts}, then robots wait for {-margin} more", " with ".join(remedies)


def _length(setting: tuple[str, int] | None, needed: int, answers: str) -> str:
    if setting is None:
        return f"{answers} of at least {_steps(needed)}"
    name, each = setting
    return f"{name}={-(-needed // each)} in training"


def _told(level: Level, latency: Latency, control_hz: float, late: int, margin: int, meaning: str, remedy: str) -> Margin:
    whose = "one robot" if latency.robots == 1 else f"{latency.robots:.3g} robots a call"
    injected = f" and {_steps(latency.injected_steps)} of injected delay" if latency.injected_steps else ""
    words = f"{level.name}: {latency.p95_ms:.3g} ms ({whose}){injected} are {_steps(late)} at {control_hz:g} Hz; {meaning}"
    return Margin(
        level=level.name,
        p50_ms=latency.p50_ms,
        p95_ms=latency.p95_ms,
        robots=latency.robots,
        control_hz=control_hz,
        late_steps=late,
        covers=level.covers,
        margin_steps=margin,
        found=words,
        remedy=remedy,
    )


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"
