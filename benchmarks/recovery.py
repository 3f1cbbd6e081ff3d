"""What are demonstrations of recovery worth? One policy from recordings without and with them, on placements with the grasp.

Both recordings have as many episodes, drawn from the same seeds; in a share of the second one's the expert makes a mistake, and
goes on from there (`record.recovery_share`). All policies are trained for as many steps and meet the same unseen episodes.
Intervals: 95 %, bootstrap over training seeds, then over episodes; differences by pairs of the same seed and episode. A stopped
study goes on where it stopped; every finished cell is in the JSON.

    uv run -m benchmarks.recovery
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import studies
from benchmarks.component_tables import GRASP, PRECISION, TRUTH
from benchmarks.files import RESULTS, RUNS, command_line, earlier, origin, read_result, write_result
from benchmarks.studies import changes_of, evaluated, opened, outcomes_of, recorded, train, won, words
from libra_ray.common.json_text import plain
from libra_ray.common.progress import ProgressBar
from libra_ray.common.provenance import describe_hardware
from libra_ray.config import Config, override, preset
from libra_ray.on_ray.session import available_cpus, connected
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.runs.folder import RunFolder, locked
from libra_ray.stats.granularity_peak import Estimate, Outcomes
from libra_ray.types import Json

SHARES = (0.0, 0.5)
TASKS = ("place-5mm", "place-1mm")
VARIED = ("record.recovery_share", "train.seed", "sim.tasks")
"""What the study gives each policy itself."""
STUDY: Mapping[str, Any] = {
    **PRECISION,
    **GRASP,
    **TRUTH,
    "sim.tasks": TASKS,
    # Who recovers takes longer.
    "sim.max_steps": 150,
    "record.episodes_per_task": 6000,
    "train.start_parts": "",
    "train.steps": 8000,
    "train.checkpoint_every": 500,
    "train.validate_every": 2000,
    "train.log_every": 40,
    "evaluate.controllers": "policy",
    "evaluate.videos_per_task": 0,
    "evaluate.seed": 500_000,
}
"""Changes of the preset `tabletop`: pictures from the wrist, two steps of every five executed, true tokens."""
QUICK: Mapping[str, Any] = {
    "data.image_size": 32,
    "sim.supersample": 1,
    "record.episodes_per_task": 4,
    "planner.width": 32,
    "planner.depth": 1,
    "refiner.width": 32,
    "refiner.depth": 1,
    "train.steps": 10,
    "train.batch_size": 8,
    "train.warmup_steps": 2,
    "train.validate_every": 10,
    "evaluate.episodes_per_task": 2,
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One policy: of a recording with that share of recoveries, from one training seed.

    Attributes:
        cpu: that it was run on.
        outcomes: task -> an episode each, in the order of the seeds: `1` succeeded, `0` did not.
        errors_mm: task -> how far from the goal the block ended in each of them; None of an episode that raised.
    """

    share: float
    seed: int
    cpu: str
    outcomes: Mapping[str, str]
    errors_mm: Mapping[str, Sequence[float | None]]
    frames: int
    train_s: float

    @classmethod
    def of(cls, folder: RunFolder, frames: int) -> Self:
        """The cell of a finished run."""
        results, tasks = evaluated(folder), folder.config.sim.tasks
        return cls(
            share=folder.config.record.recovery_share,
            seed=folder.config.train.seed,
            cpu=describe_hardware().cpu,
            outcomes=outcomes_of(results, tasks),
            errors_mm={task: [r.position_error_mm for r in results if r.task == task] for task in tasks},
            frames=frames,
            train_s=folder.wall_s("train"),
        )

    def won(self, task: str) -> Outcomes:
        """Whether each of the task's episodes succeeded."""
        return won({task: self.outcomes[task]})


@dataclass(frozen=True, kw_only=True)
class Study:
    """What of the study's JSON is read again; `settings` are those that all its cells share."""

    settings: Json
    cells: Sequence[Cell]


def config_of(share: float, seed: int, changes: Mapping[str, Any]) -> Config:
    """A cell's configuration."""
    return override(preset("tabletop"), {**STUDY, **changes, "record.recovery_share": share, "train.seed": seed})


def run(root: Path, seeds: int, changes: Mapping[str, Any], known: Sequence[Cell]) -> Iterator[Cell]:
    """Every cell that is not known, seed by seed: stopped early, a study has as many of one recording as of the other."""
    there = {(cell.share, cell.seed) for cell in known}
    wanted = [(share, seed) for seed in range(seeds) for share in SHARES if (share, seed) not in there]
    if not wanted:
        return
    with connected(), ProgressBar("recovery", total=len(wanted), unit="policies") as bar:
        for share, seed in wanted:
            data = recorded(root / f"data-{share:g}", config_of(share, 0, changes))
            yield measure(opened(root / f"{share:g}-{seed}", config_of(share, seed, changes), data))
            bar.to(bar.count + 1)


def measure(folder: RunFolder) -> Cell:
    """Train and evaluate one policy, or go on with it, or read what is finished."""
    train(folder)
    if not folder.done("evaluate"):
        with SimulatorPool(folder.config.sim, folder.config.data.image_size, available_cpus()) as pool:
            evaluated(folder, pool=pool)
    return Cell.of(folder, frames_of(folder.dataset))


def frames_of(dataset: Path) -> int:
    """Control steps that a data set holds."""
    return int(read_result(dataset / "meta" / "info.json")["total_frames"])


def success(cells: Sequence[Cell], task: str) -> Estimate:
    """Share of the task's episodes that succeed, mean over training seeds."""
    return studies.success([cell.won(task) for cell in cells])


def gain(cells: Sequence[Cell], task: str) -> Estimate | None:
    """How much more often the policies with recoveries succeed, by pairs; None as long as no seed has both."""
    sides = ({cell.seed: cell.won(task) for cell in cells if cell.share == share} for share in (max(SHARES), min(SHARES)))
    return studies.difference(*sides)


def markdown(cells: Sequence[Cell]) -> str:
    """A row a task and share, and what the recoveries add."""
    lines = ["| task | recoveries | success | they add | median final error, mm | seeds |", "|---" * 6 + "|"]
    for task in TASKS:
        for share in SHARES:
            mine = [cell for cell in cells if cell.share == share]
            if mine:
                adds = gain(cells, task) if share == max(SHARES) else None
                found = [words(success(mine, task), until=" to "), words(adds, "+.2f", until=" to ")]
                found += [f"{np.median(_errors(mine, task)):.1f}"]
                lines.append(f"| {task} | {share:g} | {' | '.join(found)} | {len(mine)} |")
    return "\n".join(lines)


def _errors(cells: Sequence[Cell], task: str) -> NDArray[np.float64]:
    """An episode that raised ended nowhere near its goal."""
    return np.array([np.inf if mm is None else mm for cell in cells for mm in cell.errors_mm[task]])


def kept(out: Path, settings: Json) -> list[Cell]:
    """The cells of an earlier result of the same settings.

    Raises:
        ValueError: it has others.
    """
    study = earlier(out, Study, settings)
    return [] if study is None else list(study.cells)


def settings_given(given: argparse.Namespace) -> dict[str, Any]:
    """Settings of all policies by the command line.

    Raises:
        ValueError: what is given is no setting, or one that the study itself varies.
    """
    return {**(QUICK if given.quick else {}), **changes_of(given.set, VARIED)}


def main() -> None:
    """Run the study, or go on with it; the JSON is written anew after every policy."""
    parser = command_line("recovery", __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of either recording (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny policies that learn nothing: does it all run?")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of every policy")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder for the work (default: runs)")
    parser.add_argument("--out", type=Path, help="JSON to write (default: benchmarks/results/recovery.json)")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error(f"--seeds {given.seeds} must be at least 1")
    name = "recovery_quick" if given.quick else "recovery"
    out = given.out or (given.runs if given.quick else RESULTS) / f"{name}.json"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        changes = settings_given(given)
        settings = plain({**STUDY, **changes})
        config_of(max(SHARES), 0, changes)
        cells = kept(out, settings)
    except ValueError as mistake:
        parser.error(str(mistake))
    with locked(given.runs / name):
        for cell in run((given.runs / name).resolve(), given.seeds, changes, list(cells)):
            cells.append(cell)
            write_result(out, {**origin(), "settings": settings, "cells": cells})
            print(f"\n{markdown(cells)}", flush=True)
    print(markdown(cells))


if __name__ == "__main__":
    main()
