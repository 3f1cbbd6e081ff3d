"""What do the parts of Libra-VLA buy? Five tables on our own tasks at the table, where only the words tell what to do.

precision   putdown-1mm, N = 10 and 64: the planner's bins alone, bins and refiner; the monolithic policy of the same training;
            in a table of its own the same with its grasp, place-1mm.
components  the paper's component table on touch and push: monolithic, + own encoder, + refinement, full.
curriculum  on the same tasks: the refiner reads ground truth first, ground truth always, or the planner's tokens always.
information on the same tasks: is it what the tokens do not say that few bins lack? The refiner may read the words itself.

Every cell is one policy: it begins with its bench's pretrained backbone (`pretraining.py`), is trained in this process, and
evaluated in closed loop on seeds that no demonstration has. A stopped study goes on where it stopped; every finished cell is in
the JSON. Intervals: 95 %, bootstrap over training seeds, then over episodes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.component_tables import BENCHES, PLACED, QUICK, TABLES, config_of
from benchmarks.files import RESULTS, ROOT, RUNS, command_line, origin, write_result
from benchmarks.pretraining import PLACE, checkpoint_of, pretrain
from benchmarks.results_table import write_between
from benchmarks.studies import evaluated, opened, train
from libra_ray import checkpoint
from libra_ray.common.files import write_text
from libra_ray.common.json_text import plain, read
from libra_ray.common.progress import ProgressBar
from libra_ray.common.provenance import describe_hardware, public_config
from libra_ray.config import Config
from libra_ray.evaluation.log import read_evaluation
from libra_ray.on_ray import stages
from libra_ray.on_ray.session import available_cpus, connected
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.on_ray.sweep.sweep_folder import MAY_CHANGE, differences
from libra_ray.report.comparison import Line, Sample, markdown, short, summarise
from libra_ray.report.interval_plot import Panel, interval_plot
from libra_ray.runs.folder import RunFolder, locked
from libra_ray.runs.results import EpisodeResult
from libra_ray.types import Json

PAGE = ROOT / "docs" / "components.md"
README = ROOT / "README.md"
MEASURED = {"precision", "precision with the grasp"}
"""Tables of tasks that end at a distance from their goal."""
EXPLAINED = "val_explained_truth"
FACTS = ("weights", "training", "residual explained")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One policy: trained from one seed, evaluated.

    Attributes:
        cpu: that it was run on.
        settings: what its result depends on, by dotted name.
        episodes: controller -> its episodes, in the order of tasks and seeds.
        difficulty: the last held-out measures (`libra_ray.model.parts.token_measures`), with their log's prefix.
    """

    bench: str
    variant: str
    seed: int
    cpu: str
    settings: Mapping[str, Any] = field(repr=False)
    parameters: int
    train_s: float
    evaluate_s: float
    steps: int
    difficulty: Mapping[str, float]
    episodes: Mapping[str, Sequence[EpisodeResult]] = field(repr=False)

    @classmethod
    def read(cls, folder: RunFolder, bench: str, variant: str) -> Self:
        """The cell of a finished run."""
        results = sorted(read_evaluation(folder).results, key=lambda r: (r.controller, r.task, r.seed))
        controllers = dict.fromkeys(result.controller for result in results)
        loaded = checkpoint.load(folder.checkpoint)
        log = stages.training_log(folder).rows
        return cls(
            bench=bench,
            variant=variant,
            seed=folder.config.train.seed,
            cpu=describe_hardware().cpu,
            settings=settings_of(folder.config),
            parameters=sum(p.numel() for p in loaded.model.parameters()),
            train_s=folder.wall_s("train"),
            evaluate_s=folder.wall_s("evaluate"),
            steps=loaded.manifest.step,
            difficulty={name: value for name, value in log[-1].metrics.items() if name.startswith("val_")},
            episodes={name: [r for r in results if r.controller == name] for name in controllers},
        )

    def to_json(self) -> Json:
        """A tree of the cell; the ages of intents, a number per control step, are not the study's question."""
        tree: Json = plain(self)
        for result in (result for found in tree["episodes"].values() for result in found):
            del result["intent_age_steps"]
        return tree

    def outcomes(self, controller: str) -> list[NDArray[np.bool_]]:
        """Whether each episode succeeded, an array per task."""
        found = self.episodes[controller]
        tasks = dict.fromkeys(result.task for result in found)
        return [np.array([r.success and r.error is None for r in found if r.task == task]) for task in tasks]

    def errors_mm(self, controller: str) -> NDArray[np.float64]:
        """The final position error of every episode that has one, in millimetres."""
        return np.array([r.position_error_mm for r in self.episodes[controller] if r.position_error_mm is not None])


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that a cell's result depends on, wherever it is run."""
    known = public_config(config).items()
    return dict(plain({n: v for n, v in known if n not in (PLACE, "data.root") and not n.startswith(MAY_CHANGE)}))


@dataclass(frozen=True, kw_only=True)
class Study:
    """What of the study's JSON is read again."""

    cells: Sequence[Cell]


def prepare(root: Path, name: str, changes: Mapping[str, Any], *, quick: bool) -> RunFolder:
    """The demonstrations of a bench, recorded and decoded once, and the backbone that all its cells begin with."""
    bench = BENCHES[name]
    data = RunFolder(root / f"{name}-data", config_of(bench, next(iter(bench.variants)), 0, changes))
    pretrain(root / f"{name}-pretrained", data, bench.pretraining, quick=quick)
    return data


def run_cell(
    root: Path,
    name: str,
    variant: str,
    seed: int,
    data: RunFolder,
    changes: Mapping[str, Any],
    pool: SimulatorPool | None = None,
) -> Cell:
    """Train and evaluate one policy, or go on with it, or read what is finished."""
    own = {PLACE: str(checkpoint_of(root / f"{name}-pretrained"))}
    folder = opened(root / f"{name}-{variant}-{seed}", config_of(BENCHES[name], variant, seed, {**changes, **own}), data)
    train(folder)
    evaluated(folder, pool=pool)
    return Cell.read(folder, name, variant)


def run(
    root: Path, benches: Sequence[str], seeds: int, changes: Mapping[str, Any], known: Sequence[Cell], *, quick: bool
) -> Iterator[Cell]:
    """Every cell that is not `known`, seed by seed: stopped early, a study has as many of one variant as of another."""
    kept = {(cell.bench, cell.variant, cell.seed) for cell in known}
    wanted = {
        (seed, name): [variant for variant in BENCHES[name].variants if (name, variant, seed) not in kept]
        for seed, name in product(range(seeds), benches)
    }
    with connected(), ProgressBar("components", total=sum(map(len, wanted.values())), unit="cells") as bar:
        for (seed, name), variants in wanted.items():
            if not variants:
                continue
            data = prepare(root, name, changes, quick=quick)
            with SimulatorPool(data.config.sim, data.config.data.image_size, available_cpus()) as pool:
                for variant in variants:
                    yield run_cell(root, name, variant, seed, data, changes, pool)
                    bar.to(bar.count + 1)


def kept_cells(out: Path, changes: Mapping[str, Any]) -> list[Cell]:
    """The cells of an earlier result that were measured under the same settings, on whatever machine."""
    if not out.exists():
        return []
    cells = read(Study, out).cells
    wanted = [settings_of(config_of(BENCHES[cell.bench], cell.variant, cell.seed, changes)) for cell in cells]
    return [cell for cell, now in zip(cells, wanted, strict=True) if not differences(dict(cell.settings), now)]


def table(name: str, cells: Sequence[Cell]) -> list[Line]:
    """The lines of a table that have been measured."""
    samples = []
    for row in TABLES[name]:
        mine = [cell for cell in cells if (cell.bench, cell.variant) == (row.bench, row.variant)]
        if mine:
            explained = [cell.difficulty[EXPLAINED] for cell in mine if EXPLAINED in cell.difficulty]
            samples.append(
                Sample(
                    label=row.label,
                    outcomes=[cell.outcomes(row.controller) for cell in mine],
                    errors_mm=[cell.errors_mm(row.controller) for cell in mine] if name in MEASURED else (),
                    facts=(
                        f"{mine[0].parameters / 1e6:.2f} M",
                        f"{np.mean([cell.train_s for cell in mine]):.0f} s",
                        f"{np.mean(explained):.2f}" if explained else "–",
                    ),
                )
            )
    return summarise(samples)


def publish(out: Path, cells: Sequence[Cell]) -> str:
    """Write JSON, tables and plot of what was measured; returns the tables."""
    if cells:
        found = origin()
        found["hardware"]["cpu"] = sorted({cell.cpu for cell in cells})
        write_result(out, {**found, "cells": [cell.to_json() for cell in cells]})
    return show(out, cells)


def show(out: Path, cells: Sequence[Cell]) -> str:
    """Write tables and plot beside the JSON at `out`; returns the tables."""
    if not cells:
        return "no cell is measured yet"
    tables = {name: lines for name in TABLES if (lines := table(name, cells))}
    text = "\n\n".join(f"**{name}**\n\n{markdown(lines, FACTS)}" for name, lines in tables.items())
    panels = [Panel(title=name, unit="success", marks=[line.success for line in lines]) for name, lines in tables.items()]
    for name in (name for name in tables if name in MEASURED):
        errors = [line.error_mm for line in tables[name] if line.error_mm]
        panels.append(Panel(title=f"{name}: error", unit="median final error, mm", marks=errors, share=False))
    write_text(out.with_suffix(".md"), text + "\n")
    write_text(out.with_suffix(".svg"), interval_plot(panels))
    if out.parent.resolve() == RESULTS:
        write_between(PAGE, Path(__file__).name, text)
        write_between(README, Path(__file__).name, for_readme(tables["precision"]))
    return text


def for_readme(lines: Sequence[Line]) -> str:
    """The question of precision in short: the policies of ten bins, and the monolithic one."""
    shown = [row.label for row in TABLES["precision"] if row.variant in PLACED]
    rows = [short(line) for line in lines if line.sample.label in shown]
    return "\n".join(["| policy | block within 1 mm | median final error, mm |", "|---|---|---|", *rows])


def main() -> None:
    """Run the study, or go on with it, and print its tables after every cell."""
    parser = command_line("components", __doc__)
    parser.add_argument("--benches", nargs="+", choices=BENCHES, default=list(BENCHES), help="place, grasp: precision")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of every variant (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimiser steps of every policy (default: each bench has its own)")
    parser.add_argument("--quick", action="store_true", help="tiny policies that learn nothing: does it all run?")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder for the work (default: runs)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of every policy")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the tables of a finished study and write them anew")
    given = parser.parse_args()
    if given.show:
        print(show(given.show, read(Study, given.show).cells))
        return
    if given.seeds < 1 or (given.steps is not None and given.steps < 1):
        parser.error(f"--seeds {given.seeds} and --steps {given.steps} must be at least 1")
    name = "components_quick" if given.quick else "components"
    out = (given.runs if given.quick else RESULTS) / f"{name}.json"
    changes: dict[str, Any] = {**({"train.steps": given.steps} if given.steps else {}), **(QUICK if given.quick else {})}
    try:
        changes |= dict(pair.split("=", 1) for pair in given.set)
        for bench in BENCHES.values():
            for variant in bench.variants:
                config_of(bench, variant, 0, changes)
    except ValueError as mistake:
        parser.error(f"--set {' '.join(given.set)}: {mistake}; give NAME=VALUE, e.g. train.lr=0.002")
    with locked(given.runs / name):
        cells = kept_cells(out, changes)
        text = publish(out, cells)
        for cell in run(given.runs / name, given.benches, given.seeds, changes, cells, quick=given.quick):
            cells.append(cell)
            print(f"\n{cell.bench} {cell.variant} seed {cell.seed}: {cell.train_s:.0f} s + {cell.evaluate_s:.0f} s", flush=True)
            text = publish(out, cells)
    print(text)


if __name__ == "__main__":
    main()
