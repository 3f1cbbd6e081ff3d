"""Which system is the best of equal data and equal training time? All of them against plain networks, and each against itself.

ranking    every system against monolithic regression, monolithic diffusion and plain behaviour cloning.
anchor     AnchorRefine against its own base for the same time, against its anchor alone, and against its ablations.
experts    the router against each expert, of the same weights and trained alone; which expert acts in which task.
hierarchy  two levels against three of equal weights, over the length of chains.
latency    milliseconds of every level for 1 and 16 robots, and what `jobs/budget.py` proposes for 20 Hz.

Every policy of a domain learns from the same demonstrations for the same time, CPU seconds of this process, or on a GPU real
time: how long a system's step takes is measured first, and from that follow the steps that its schedule counts by. All meet the
same unseen episodes. Intervals: 95 %, bootstrap over training seeds, then over episodes; differences by pairs of the same seed
and episode. Each interval stands alone: of twenty differences where there is none, one excludes 0. Of one seed it knows nothing
of others. Tables share policies: none is trained twice. A stopped study goes on where it stopped, seed by seed: it is a
whole one of fewer seeds.

    uv run -m benchmarks.systems metaworld
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import studies
from benchmarks.files import RESULTS, RUNS, command_line, earlier, origin, write_result
from benchmarks.pretraining import PRETRAINING
from benchmarks.studies import changes_of, recorded, won
from benchmarks.systems_pace import PROBED_STEPS
from benchmarks.systems_page import publish
from benchmarks.systems_tables import (
    DOMAINS,
    LATENCY,
    QUICK,
    SEED,
    VARIANTS,
    VARIED,
    Domain,
    config_of,
    evaluated_config,
    variants_of,
)
from benchmarks.systems_times import SystemTime
from benchmarks.systems_training import Cell, Course, paces_of
from libra_ray.common.json_text import plain
from libra_ray.common.progress import ProgressBar
from libra_ray.on_ray.session import available_cpus, connected
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.runs.folder import locked
from libra_ray.types import Json

UNSAID = "data.root"
"""Where on this machine the demonstrations lie: no setting that results depend on."""
QUICK_SECONDS, QUICK_EPISODES, QUICK_STEPS = 0.3, 1, 6


@dataclass(frozen=True, kw_only=True)
class Study:
    """What of the study's JSON is read again; `settings` are those that all its cells share."""

    settings: Json
    cells: Sequence[Cell]
    times: Sequence[SystemTime]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be measured: of one domain these tables' policies, for so many seeds."""

    domain: Domain
    tables: Sequence[str]
    variants: Sequence[str]
    seeds: int
    episodes: int
    seconds: float
    probed_steps: int
    threads: int
    quick: bool
    changes: Json

    @property
    def settings(self) -> Json:
        """What every cell's result depends on."""
        own = {name: value for name, value in self.changes.items() if name != UNSAID}
        shared = {"episodes": self.episodes, "seconds": self.seconds, "threads": self.threads, "evaluate.seed": SEED}
        began = {} if self.domain.pretraining is None else {"pretraining": {**PRETRAINING, **self.domain.pretraining}}
        of_domain = {"preset": self.domain.preset, "tasks": self.domain.tasks, **self.domain.changes}
        found: Json = plain({**shared, **of_domain, **began, **own})
        return found

    def cells(self, known: Sequence[Cell]) -> list[tuple[int, str]]:
        """Seeds and policies that are not known yet: stopped early, a study has as many seeds of one as of another."""
        there = {(cell.seed, cell.variant) for cell in known}
        wanted = {name for table in self.tables if table != LATENCY for name in variants_of(table, self.domain)}
        named = [name for name in VARIANTS if name in wanted and name in self.variants]
        return [(seed, name) for seed in range(self.seeds) for name in named if (seed, name) not in there]

    def times(self, known: Sequence[SystemTime]) -> list[str]:
        """Policies whose levels are not timed yet."""
        there, wanted = {time.variant for time in known}, variants_of(LATENCY, self.domain) if LATENCY in self.tables else ()
        return [name for name in wanted if name in self.variants and name not in there]


def run(root: Path, order: Order, known: Study) -> Iterator[Cell | SystemTime]:
    """Everything of the order that is not known yet."""
    cells, times = order.cells(known.cells), order.times(known.times)
    if not cells and not times:
        return
    root.mkdir(parents=True, exist_ok=True)
    with connected(), ProgressBar("systems", total=len(cells) + len(times), unit="cells") as bar:
        course = Course(
            root=root,
            domain=order.domain,
            data=recorded(root / "data", config_of(order.domain, "libra", 0, order.changes)),
            changes=order.changes,
            episodes=order.episodes,
            seconds=order.seconds,
            probed_steps=order.probed_steps,
            quick=order.quick,
            paced=paces_of(known.cells),
        )
        course.prepare()
        course.measure_paces([variant for _, variant in cells] + times)
        config = evaluated_config(course.data.config, order.domain, 1)
        with SimulatorPool(config.sim, config.data.image_size, available_cpus()) as pool:
            for seed, variant in cells:
                yield course.cell(variant, seed, pool)
                bar.to(bar.count + 1)
        for variant in times:
            yield course.times(variant)
            bar.to(bar.count + 1)


def ordered(given: argparse.Namespace) -> Order:
    """What the command line asks for.

    Raises:
        ValueError: there is no such table in the domain, a number is too small, or a setting is none.
    """
    domain = DOMAINS[given.domain]
    if unknown := [table for table in given.tables if table not in domain.tables]:
        raise ValueError(f"--tables {' '.join(unknown)}: of {given.domain} there are {', '.join(domain.tables)}")
    if unknown := [variant for variant in given.variants if variant not in VARIANTS]:
        raise ValueError(f"--variants {' '.join(unknown)}: there are {', '.join(VARIANTS)}")
    small: dict[str, Any] = {**QUICK, "record.episodes_per_task": domain.few} if given.quick else {}
    gpu: dict[str, Any] = {"ray.use_gpu": True} if given.gpu else {}
    seconds = given.seconds if given.seconds is not None else QUICK_SECONDS if given.quick else domain.seconds
    episodes = given.episodes if given.episodes is not None else QUICK_EPISODES if given.quick else domain.episodes
    for name, value in (("--seeds", given.seeds), ("--episodes", episodes), ("--threads", given.threads)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if not seconds > 0:
        raise ValueError(f"--seconds {seconds:g} must be above 0")
    order = Order(
        domain=domain,
        tables=given.tables or domain.tables,
        variants=given.variants or tuple(VARIANTS),
        seeds=given.seeds,
        episodes=episodes,
        seconds=seconds,
        probed_steps=QUICK_STEPS if given.quick else PROBED_STEPS["cuda" if given.gpu else "cpu"],
        threads=given.threads,
        quick=given.quick,
        changes={**small, **gpu, **changes_of(given.set, VARIED)},
    )
    named = dict.fromkeys([variant for _, variant in order.cells(())] + order.times(()))
    if not named:
        raise ValueError(f"--variants {' '.join(given.variants)}: none of them is in {', '.join(order.tables)}")
    for variant in named:
        config_of(domain, variant, 0, order.changes)
    return order


def said(measured: Cell | SystemTime) -> str:
    """What was measured, in a line."""
    if isinstance(measured, SystemTime):
        return f"{measured.variant}: {', '.join(f'{row.level} {row.p50_ms:.3g} ms' for row in measured.levels)}"
    rates = ", ".join(f"{name} {studies.success([won(of.outcomes)]).value:.2f}" for name, of in measured.played.items())
    return f"{measured.variant}, seed {measured.seed}: {measured.steps} steps in {measured.spent_s:.0f} s; success: {rates}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line("systems", __doc__)
    parser.add_argument("domain", choices=DOMAINS, help="tasks, demonstrations and time that all its policies share")
    parser.add_argument("--tables", nargs="+", default=[], help="those above (default: all that the domain has)")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of every policy (default: %(default)s)")
    parser.add_argument("--episodes", type=int, help="of each task and policy (default: the domain's)")
    parser.add_argument("--seconds", type=float, help="of each training, CPU time or a GPU's (default: the domain's)")
    parser.add_argument("--variants", nargs="+", default=[], help="policies, e.g. libra (default: those of the tables)")
    # Threads that wait for one another spin: of more than one a shared machine counts waiting as work.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of networks (default: %(default)s)")
    parser.add_argument("--gpu", action="store_true", help="train and evaluate on a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny policies that learn nothing: does it all run?")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of every policy")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder for the work (default: runs)")
    parser.add_argument("--out", type=Path, help="JSON to write (default: benchmarks/results/systems_<domain>.json)")
    parser.add_argument("--show", action="store_true", help="run nothing: write tables and plots of what is measured")
    return parser


def main() -> None:
    """Run the study, or go on with it; the JSON is written anew after every cell, tables and plots at the end."""
    asked = parser()
    given = asked.parse_args()
    name = f"systems_{given.domain}" + ("_quick" if given.quick else "")
    out = given.out or (given.runs if given.quick else RESULTS) / f"{name}.json"
    try:
        order = ordered(given)
        found = earlier(out, Study, order.settings) or Study(settings=order.settings, cells=[], times=[])
    except ValueError as mistake:
        asked.error(str(mistake))
    torch.set_num_threads(given.threads)
    cells, times = list(found.cells), list(found.times)
    try:
        if not given.show:
            root = (given.runs / name).resolve()
            with locked(root):
                for measured in run(root, order, found):
                    if isinstance(measured, Cell):
                        cells.append(measured)
                    else:
                        times.append(measured)
                    rows = {"cells": [plain(each) for each in cells], "times": [plain(each) for each in times]}
                    write_result(out, {**origin(), "settings": order.settings, **rows})
                    print(f"\n{said(measured)}", flush=True)
    finally:
        print(publish(out, given.domain, cells, times, page=out.parent.resolve() == RESULTS))


if __name__ == "__main__":
    main()
