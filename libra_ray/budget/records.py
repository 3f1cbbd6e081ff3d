"""What `budget.json` and `profile.json` hold: a field is a key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from libra_ray.common.provenance import Hardware

BATCHES = (1, 4, 16, 64)
"""Robots in one call, as measured."""
ROBOT, TRANSPORT, GATEWAY = "robot", "transport", "gateway"
"""Where a component runs that belongs to no level."""
WHOLE, REST = "whole level", "rest"
"""A level's call, and what of it no named component took."""


@dataclass(frozen=True, kw_only=True)
class ComponentTime:
    """Milliseconds of one component for a batch of robots.

    Attributes:
        where: `ROBOT`, `TRANSPORT`, `GATEWAY`, or a level's name.
        batch: robots that it was for. On the robot each has a processor of its own.
        p50_ms, p95_ms: of all calls that one call of the level makes of it; `calls` of them.
    """

    where: str
    name: str
    batch: int
    p50_ms: float
    p95_ms: float
    calls: int = 1


@dataclass(frozen=True, kw_only=True)
class TimedCall:
    """Milliseconds of one measured call for a batch of robots, with so many denoising steps; 0 where nothing is denoised."""

    batch: int
    steps: int
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, kw_only=True)
class ComponentProfile:
    """What was measured of a checkpoint on this machine.

    Attributes:
        digest: of the checkpoint.
        denoising_level: the level that denoises; empty where none does.
        denoising_setting: the setting that says in how many steps.
        denoising_steps: those of the checkpoint, with which `components` were measured; 0 where nothing is denoised.
        most_steps: of denoising, that are still different ones.
        calls: by the level's name, whole calls at several batches and denoising steps.
        jpeg: quality of the pictures on the way; 0 is raw.
    """

    digest: str
    system: str
    device: str
    threads: int
    jpeg: int
    denoising_level: str
    denoising_setting: str
    denoising_steps: int
    most_steps: int
    machine: Hardware
    components: Sequence[ComponentTime]
    calls: Mapping[str, Sequence[TimedCall]]


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Milliseconds = overhead + per_robot * robots + steps * (per_step + per_step_robot * robots); no term is below 0.

    Where so many robots or fewer, and so many steps or fewer, were measured to take longer, it is that.

    Attributes:
        measured: the calls that it was fitted to.
        worst_error: largest relative error at these.
    """

    overhead: float
    per_robot: float
    per_step: float = 0.0
    per_step_robot: float = 0.0
    measured: Sequence[TimedCall] = ()
    worst_error: float = 0.0

    def ms(self, batch: int, steps: int = 0) -> float:
        """Of one call; never less than the p95 of a measured one that had no more to do."""
        fitted = self.overhead + self.per_robot * batch + steps * (self.per_step + self.per_step_robot * batch)
        return max([fitted, *(call.p95_ms for call in self.measured if call.batch <= batch and call.steps <= steps)])


@dataclass(frozen=True, kw_only=True)
class MeasuredSuccess:
    """Closed-loop success in simulated time, with the delays of a candidate; Wilson's 95 % interval."""

    successes: int
    episodes: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the checkpoint.

    Attributes:
        denoising_steps: 0 where nothing is denoised.
        batch: robots in one call.
        ms: of one control decision, from picture to actions, by the p95 of every component.
        late_steps: by the level's name, control steps until its answer is usable.
        margin_steps: by the level's name, see `libra_ray.control.margin`; under the rule `fifo`, by which a robot waits for the
            levels above, of the last one alone.
        robots: that one replica of each level and one gateway serve with such batches.
        most_robots: the same with the best batch within the budget.
        misses: what speaks against it, in words; empty where it fits.
        front: whether no other one that fits is better in one respect and worse in none.
        success: None where it was not evaluated.
    """

    denoising_steps: int
    execute_steps: int
    batch: int
    ms: float
    late_steps: Mapping[str, int]
    margin_steps: Mapping[str, int]
    robots: int
    most_robots: int
    misses: Sequence[str] = ()
    front: bool = False
    success: MeasuredSuccess | None = None

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.misses


@dataclass(frozen=True, kw_only=True)
class BudgetReport:
    """The answer.

    Attributes:
        budget_ms: per control decision.
        robots: that shall be served.
        rule: of control; `committed_steps` too.
        models: by the level's name, and of `GATEWAY` and `TRANSPORT`.
        chunks: M, chunks that a plan covers, fixed in training; `least_chunks` is how many the proposal needs. None where no
            setting lengthens the level above the last.
        measured: whether success was measured.
        proposal: None where nothing fits.
    """

    checkpoint: str
    budget_ms: float
    control_hz: float
    robots: int
    rule: str
    committed_steps: int
    measured: bool
    models: Mapping[str, LatencyModel]
    candidates: Sequence[Candidate]
    chunks: int | None
    least_chunks: int | None
    proposal: Candidate | None
    profile: ComponentProfile
