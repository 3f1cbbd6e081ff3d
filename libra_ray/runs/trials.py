"""What a sweep has found: its trials, the configurations behind them over their seeds, and the Pareto front."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from libra_ray.common.json_text import Flat
from libra_ray.stats.granularity_peak import Outcomes, success_draws

Status = Literal["finished", "stopped", "failed"]
Search = Literal["grid", "random", "optuna"]
Scheduler = Literal["asha", "fifo"]
Objective = Literal["success", "latency_ms"]
PLAN_RESOLVED, VARIANCE_EXPLAINED = "val_plan_resolved", "val_variance_explained"
"""What each system has solved of its problem, at most 1: the planner of the entropy given the instruction, the refiner of
the variance of the actions when it reads ground-truth tokens (of the whole: what the bins leave may be next to nothing)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a sweep searches.

    Attributes:
        trials: configurations, each tried with `seeds` seeds.
        hours: after this time no trial is started any more, those that run come to their end; 0 sets no limit.
        concurrent: trials at a time; 0 means as many as the cluster's resources give.
        rung_episodes: episodes per task at every rung before the last.
    """

    search: Search
    scheduler: Scheduler
    trials: int
    seeds: int
    hours: float = 0.0
    concurrent: int = 0
    rung_episodes: int = 10
    controllers: Sequence[str] = ("policy",)

    @property
    def identity(self) -> dict[str, Any]:
        """What a continued sweep must agree on, by name."""
        return {name: value for name, value in asdict(self).items() if name not in ("hours", "concurrent")}


@dataclass(frozen=True, kw_only=True)
class Rung(Flat):
    """What a trial measured on its way, and reports to the scheduler.

    Attributes:
        budget: the share of the training steps that was reached, in the scheduler's units.
        step: the optimiser step.
        success: in closed loop, over `episodes` episodes.
        latency_ms: as in `TrialResult`, as are `measures`.
        wall_s: seconds since the trial began, interruptions excluded.
    """

    budget: int
    step: int
    success: float
    latency_ms: float | None = None
    episodes: int = 0
    wall_s: float = 0.0
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How one trial, a configuration with one seed, ended.

    Attributes:
        number: the configuration's number in the sweep; `seed`: its `train.seed`.
        values: what the space changed, by dotted name.
        status: `stopped` by the scheduler before its last rung, `failed` with `error`.
        episodes: controller -> task -> whether each evaluated episode succeeded, of the last rung that was reached.
        measures: the training log's last, `val_` on held-out episodes (see `System.measure`); gradient norms are
            medians.
        latency_ms: inference time per executed control step of one robot, milliseconds.
        position_error_mm: controller -> mean final distance from the goal, where the task has one.
        rungs: closed-loop success at every rung on the way, by share of the training steps.
        wall_s: seconds, interruptions excluded.
    """

    number: int
    seed: int
    values: Mapping[str, Any]
    status: Status
    episodes: Mapping[str, Mapping[str, Sequence[bool]]] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    latency_ms: float | None = None
    position_error_mm: Mapping[str, float] = field(default_factory=dict)
    rungs: Sequence[Rung] = field(default_factory=list)
    error: str | None = None
    wall_s: float = 0.0

    def outcomes(self, controller: str = "policy") -> Outcomes:
        """Successes of one controller, an array per task."""
        return [np.asarray(episodes, dtype=bool) for episodes in self.episodes.get(controller, {}).values()]

    def success_of(self, controller: str = "policy") -> float | None:
        """Mean over tasks of the share of successful episodes; None where none was evaluated."""
        outcomes = self.outcomes(controller)
        return float(np.mean([task.mean() for task in outcomes])) if outcomes else None


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One point of the space, over its seeds.

    Only finished trials count towards the figures: one that the scheduler stopped was measured earlier in training.

    Attributes:
        controller: whose success it is.
        success: mean over seeds of the closed-loop success; `interval`: hierarchical bootstrap over seeds and episodes.
    """

    number: int
    values: Mapping[str, Any]
    trials: Sequence[TrialResult]
    controller: str
    success: float | None
    interval: tuple[float, float] | None

    def count(self, status: Status) -> int:
        """Trials that ended so."""
        return sum(trial.status == status for trial in self.trials)

    @property
    def finished(self) -> list[TrialResult]:
        """The trials that count."""
        return [trial for trial in self.trials if trial.status == "finished"]

    @property
    def latency_ms(self) -> float | None:
        """Mean over seeds."""
        return mean([trial.latency_ms for trial in self.finished])

    def measure(self, name: str) -> float | None:
        """Mean of an offline measure over seeds; None where it was never taken."""
        return mean([trial.measures.get(name) for trial in self.finished])


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the known values; None where there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def configurations(trials: Sequence[TrialResult], controller: str = "policy") -> list[Configuration]:
    """The trials' configurations in the order of their numbers, each over its seeds."""
    groups: dict[int, list[TrialResult]] = {}
    for trial in sorted(trials, key=lambda trial: (trial.number, trial.seed)):
        groups.setdefault(trial.number, []).append(trial)
    return [_configuration(number, group, controller) for number, group in sorted(groups.items())]


def _configuration(number: int, trials: Sequence[TrialResult], controller: str) -> Configuration:
    seeds = [o for t in trials if t.status == "finished" and (o := t.outcomes(controller))]
    interval = None
    if seeds:
        low, high = np.quantile(success_draws(seeds, np.random.default_rng(number)), [0.025, 0.975])
        interval = (float(low), float(high))
    success = mean([t.success_of(controller) for t in trials if t.status == "finished"])
    return Configuration(
        number=number, values=trials[0].values, trials=trials, controller=controller, success=success, interval=interval
    )


def best(found: Sequence[Configuration]) -> Configuration | None:
    """The configuration of the highest success, the faster one of equals; None where nothing was finished.

    One that failed with some seed is chosen only where every one did.
    """
    known = [c for c in found if c.success is not None]
    sound = [c for c in known if not c.count("failed")] or known
    return min(sound, key=lambda c: (-(c.success or 0.0), c.latency_ms or 0.0, c.number), default=None)


def pareto_front(points: NDArray[np.float64]) -> list[int]:
    """Rows that no other row dominates; the more the better in every column.

    One dominates another if it is nowhere worse and somewhere better; equal rows do not dominate each other.

    Args:
        points: `(points, objectives)`, finite.
    """
    front = []
    for index, point in enumerate(points):
        dominated = (points >= point).all(axis=1) & (points > point).any(axis=1)
        if not dominated.any():
            front.append(index)
    return front
