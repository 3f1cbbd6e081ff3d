"""What a run leaves behind for its report: evaluated episodes, logged training steps, rollouts to look at."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from libra_ray.common.files import append_jsonl
from libra_ray.common.json_text import ABSENT, Flat, parse

SPEED = (
    "samples_per_s",
    "data_wait_share",
    "forward_share",
    "backward_share",
    "optimiser_share",
    "communication_share",
    "tflops",
    "mfu",
    "peak_tflops",
    "memory_gib",
)
"""What a training log says of speed and memory; the rest is what was learned."""


@dataclass(frozen=True, kw_only=True)
class EpisodeReplans:
    """How far one value of a level's fresh intents differed from what was in use, an entry a replacement; see `Replan`."""

    level: str
    value: str
    shares: Sequence[float] = ()
    differences: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class ChunkJerk:
    """Mean norm of the second difference of consecutive executed actions, in action units a control step squared.

    All three actions are fresh ones; actions are position changes, so this is the third difference of the position.

    Attributes:
        boundary: at steps whose action comes from another chunk than the one before.
        within: where all three come from one chunk. None, like the other, where there was no such step.
    """

    boundary: float | None
    within: float | None


@dataclass(frozen=True, kw_only=True)
class GoalReaction:
    """When a policy's actions first knew of a goal that was moved.

    Attributes:
        moved_at: the control step whose picture is the first to show it.
        chunk_steps: from there to the first executed action whose chunk was made from that picture or a later one; None where
            the episode ended before. `intent_steps`: to the first whose intent was.
    """

    moved_at: int
    chunk_steps: int | None
    intent_steps: int | None


@dataclass(frozen=True, kw_only=True)
class EpisodeAsynchrony:
    """What happened between the levels in one episode; what does not apply is left out."""

    replans: Sequence[EpisodeReplans] = ()
    jerk: ChunkJerk | None = field(default=None, metadata=ABSENT)
    reaction: GoalReaction | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """The small record of an evaluated episode, as reports and trackers keep it; see `Episode` for what its fields mean.

    Attributes:
        asynchrony: None where no policy acted, or an earlier version wrote the row.
        measures: means over its actions of what their chunks' level measured of its answers; None where it measured nothing.
    """

    task: str
    instruction: str
    controller: str
    seed: int
    success: bool
    steps: int
    error: str | None = None
    held_actions: int = 0
    intent_age_steps: Sequence[int] = field(default_factory=tuple)
    position_error_mm: float | None = None
    parts_done: int | None = field(default=None, metadata=ABSENT)
    asynchrony: EpisodeAsynchrony | None = field(default=None, metadata=ABSENT)
    measures: Mapping[str, float] | None = field(default=None, metadata=ABSENT)

    @property
    def succeeded(self) -> bool:
        """Whether it counts as a success: one that raised does not."""
        return self.success and self.error is None


PHASE = "phase_"
"""Begins the names of a training log that say which phase training is in."""


@dataclass(frozen=True, kw_only=True)
class LevelLatencies:
    """The batched calls of one level of a policy.

    Attributes:
        ms: wall time of each call, in milliseconds.
        robots: robots in each call.

    Raises:
        ValueError: they differ in length.
    """

    ms: Sequence[float] = ()
    robots: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Refuse what would make a report count wrongly."""
        if len(self.ms) != len(self.robots):
            raise ValueError(f"{len(self.robots)} batch sizes; there must be one per latency, {len(self.ms)}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All evaluated episodes of one run and what they cost.

    Attributes:
        results: every episode, of every task and controller; one that raised carries its error and counts as failed.
        latencies: level -> its calls; levels that were never called may be left out.
        env_steps: control steps executed by all simulated robots.
        wall_s: wall time of the evaluation, in seconds.

    Raises:
        ValueError: an episode occurs twice.
    """

    results: Sequence[EpisodeResult]
    latencies: Mapping[str, LevelLatencies] = field(default_factory=dict)
    env_steps: int = 0
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what would make a report count wrongly."""
        counts = Counter((result.task, result.controller, result.seed) for result in self.results)
        twice = [episode for episode, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"{len(twice)} episodes occur more than once, first (task, controller, seed) = {twice[0]}")


@dataclass(frozen=True, kw_only=True)
class LoggedStep(Flat):
    """The metrics of one optimiser step, by name; a row of the log, which need not have all of them."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PhaseStart:
    """A phase of training, and the first logged optimiser step in it."""

    name: str
    first_step: int


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """The metrics of training, one row per logged optimiser step, in ascending order of `step`.

    Known names: `loss` and each of its terms, `loss_<term>`; `grad_norm_<part>` of each part's parameters under the weighted
    loss; `weight_<term>`, `grad_norm_loss_<term>` of each loss alone, and `grad_cosine_shared` between both where parts share
    parameters; `plan_accuracy`; `phase_<name>` (1 in that phase of the schedule, 0 in the others), speed and memory
    (`SPEED`), and `val_*` on held-out episodes (`System.measure`).
    """

    rows: Sequence[LoggedStep] = ()

    @classmethod
    def from_rows(cls, rows: Iterable[LoggedStep]) -> Self:
        """The log of rows in the order they were written; after a resume steps repeat, and the last row of a step wins."""
        by_step = {row.step: row for row in rows}
        return cls(rows=[by_step[step] for step in sorted(by_step)])

    @classmethod
    def read(cls, path: Path) -> Self:
        """The log of a JSONL file. A missing file is an empty log; a row that a crash cut short is left out.

        Raises:
            ValueError: a line is no row, and no crash explains it; names the file, the line and the field.
        """
        lines = path.read_bytes().splitlines() if path.exists() else []
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(_row(line, f"{path}, line {number}"))
            except ValueError:
                if number < len(lines):
                    raise
        return cls.from_rows(rows)

    @property
    def names(self) -> list[str]:
        """The names of all metrics, sorted."""
        return sorted({name for row in self.rows for name in row.metrics})

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps and finite values of one metric; gaps are passed over."""
        known = [(row.step, float(row.metrics[name])) for row in self.rows if name in row.metrics]
        finite = [(step, value) for step, value in known if math.isfinite(value)]
        return [step for step, _ in finite], [value for _, value in finite]

    def last(self, name: str) -> float | None:
        """The last finite value of one metric; None where there is none."""
        values = self.series(name)[1]
        return values[-1] if values else None

    def late_median(self, name: str) -> float | None:
        """The median of one metric over the last tenth of its values: for gradients, which are noise step by step."""
        values = self.series(name)[1]
        return float(np.median(values[-max(1, len(values) // 10) :])) if values else None

    @property
    def phases(self) -> list[PhaseStart]:
        """The phases that training went through, in that order, with the first logged step of each."""
        began: dict[str, int] = {}
        for row in self.rows:
            for name in _phases_of(row.metrics):
                began.setdefault(name, row.step)
        return [PhaseStart(name=name, first_step=step) for name, step in began.items()]


def log_step(path: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Append a row to a training log.

    Raises:
        ValueError: a metric is not finite.
    """
    append_jsonl(path, [{"step": step, **metrics}])


@dataclass(frozen=True, kw_only=True)
class RolloutVideo:
    """One evaluated episode to look at.

    Attributes:
        frames: pictures `(height, width, 3)` uint8, RGB, all of one size.
        fps: pictures per second when shown.
    """

    task: str
    controller: str
    seed: int
    success: bool
    frames: Sequence[NDArray[np.uint8]]
    fps: float = 20.0


def _phases_of(metrics: Mapping[str, float]) -> list[str]:
    """The phase of a row; earlier versions knew one switch alone, and logged whether it was still to come."""
    if (forcing := metrics.get("teacher_forcing")) is not None:
        return ["ground_truth" if forcing >= 0.5 else "sampled"]
    return [name.removeprefix(PHASE) for name, value in metrics.items() if name.startswith(PHASE) and value >= 0.5]


def _row(line: bytes, source: str) -> LoggedStep:
    try:
        return parse(LoggedStep, line, source)
    except ValueError as error:
        try:
            # After a crash the next row may stand behind the cut one, on the same line.
            return parse(LoggedStep, line[line.rfind(b"{") :], source)
        except ValueError:
            raise error from None
