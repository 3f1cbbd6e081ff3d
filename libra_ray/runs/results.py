"""What a run leaves behind for its report: evaluated episodes, training rows, rollouts to look at."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from libra_ray.types import EpisodeResult


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All evaluated episodes of one run and what they cost.

    Attributes:
        results: every episode, of every task and controller; one that raised carries its error and counts as failed.
        planner_latency_ms: wall time of each batched planner call, in milliseconds.
        refiner_latency_ms: wall time of each batched refiner call, in milliseconds.
        planner_batch_sizes: robots in each planner call, as long as `planner_latency_ms`.
        refiner_batch_sizes: robots in each refiner call, as long as `refiner_latency_ms`.
        env_steps: control steps executed by all simulated robots.
        wall_s: wall time of the evaluation, in seconds.

    Raises:
        ValueError: an episode occurs twice, or latencies and batch sizes differ in length.
    """

    results: Sequence[EpisodeResult]
    planner_latency_ms: Sequence[float] = ()
    refiner_latency_ms: Sequence[float] = ()
    planner_batch_sizes: Sequence[int] = ()
    refiner_batch_sizes: Sequence[int] = ()
    env_steps: int = 0
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what would make a report count wrongly."""
        counts = Counter((result.task, result.controller, result.seed) for result in self.results)
        twice = [episode for episode, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"{len(twice)} episodes occur more than once, first (task, controller, seed) = {twice[0]}")
        for system in ("planner", "refiner"):
            calls, sizes = len(getattr(self, f"{system}_latency_ms")), len(getattr(self, f"{system}_batch_sizes"))
            if calls != sizes:
                raise ValueError(f"{system}_batch_sizes has {sizes} entries; it must have one per latency, {calls}")


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """The metrics of training, one row per logged optimiser step, in ascending order of `step`.

    Known keys: `loss`, `loss_plan`, `loss_diff`, `plan_accuracy`; `grad_norm_planner`, `grad_norm_refiner` of each system's
    parameters under the weighted loss; `weight_plan`, `weight_diff`; `grad_norm_loss_plan`, `grad_norm_loss_diff` of each loss
    alone, and `grad_cosine_shared` between both where the systems share parameters; `teacher_forcing` (1 while the refiner
    reads ground-truth tokens), `samples_per_s`, `data_wait_share`, and `val_*` on held-out episodes
    (`libra_ray.training.difficulty`). A row need not have all of them.
    """

    rows: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Self:
        """The log of rows in the order they were written; after a resume steps repeat, and the last row of a step wins."""
        by_step = {int(row["step"]): row for row in rows}
        return cls(rows=[by_step[step] for step in sorted(by_step)])

    @classmethod
    def read(cls, path: Path) -> Self:
        """The log of a JSONL file. A missing file is an empty log; a row that a crash cut short is left out.

        Raises:
            ValueError: a line is no row, and no crash explains it.
        """
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows: list[Mapping[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            # After a crash the next row may stand behind the cut one, on the same line.
            row = _row(line) or _row(line[line.rfind("{") :])
            if row is not None:
                rows.append(row)
            elif number < len(lines):
                raise ValueError(f"{path.name}, line {number}: not a JSON object with a 'step'")
        return cls.from_rows(rows)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps and finite values of one metric; words and gaps are passed over."""
        known = [(int(row["step"]), float(row[key])) for row in self.rows if isinstance(row.get(key), int | float)]
        finite = [(step, value) for step, value in known if math.isfinite(value)]
        return [step for step, _ in finite], [value for _, value in finite]

    @property
    def teacher_forcing_until(self) -> int | None:
        """The first logged step at which the refiner read the planner's own tokens after ground truth; None if never."""
        steps, shares = self.series("teacher_forcing")
        for before, after, step in zip(shares, shares[1:], steps[1:], strict=False):
            if before >= 0.5 > after:
                return step
        return None


@dataclass(frozen=True, kw_only=True)
class Rollout:
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


def _row(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
