"""What is the split for? Success against a late network: planner and refiner, one network, and plain behaviour cloning.

In simulated time, by injected delays (`delay.*`), so that the answer does not depend on the machine. Every policy learns from
the same demonstrations and meets the same episodes; a stopped study goes on where it stopped. `asynchrony_page.py` says what
the curves are and draws them.

    uv run -m benchmarks.asynchrony metaworld
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import baseline
from benchmarks.asynchrony_page import CURVES, DELAYS, DOMAINS, PANELS, VARIANTS, Cell, Curve, Domain, publish
from benchmarks.files import RESULTS, RUNS, command_line, earlier, origin, write_result
from libra_ray.common.json_text import plain
from libra_ray.common.progress import ProgressBar
from libra_ray.common.provenance import describe_hardware
from libra_ray.config import Config, override, preset
from libra_ray.evaluation.log import read_evaluation
from libra_ray.on_ray import evaluate as evaluation
from libra_ray.on_ray import stages
from libra_ray.on_ray.evaluate import Load, load_trained
from libra_ray.on_ray.session import available_cpus, connected
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.on_ray.sweep.trial import train_until
from libra_ray.runs.folder import RunFolder, locked
from libra_ray.training.data import TrainingData
from libra_ray.types import Json

CLONING_CPU_S = 240.0
"""CPU seconds that plain behaviour cloning trains for: about what 1,500 steps of the others take on two cores."""
SEED = 400_000


@dataclass(frozen=True, kw_only=True)
class Study:
    """What of the study's JSON is read again; `settings` are those that all its cells share."""

    settings: Json
    cells: Sequence[Cell]


def config_of(domain: Domain, variant: str, seed: int, more: dict[str, Any]) -> Config:
    """The configuration that a variant is trained with."""
    alone = {"evaluate.controllers": "policy", "evaluate.videos_per_task": 0, "train.seed": seed}
    return override(preset(domain.preset), {**domain.changes, **VARIANTS[variant].changes, **alone, **more})


def cell_config(trained: Config, curve: Curve, delay: int, episodes: int) -> Config:
    """The configuration that a cell is evaluated with."""
    seeds = {"evaluate.seed": SEED, "evaluate.episodes_per_task": episodes}
    return override(trained, {**seeds, **curve.late(delay), **curve.control})


def run(domain: Domain, root: Path, known: Sequence[Cell], given: argparse.Namespace) -> Iterator[Cell]:
    """Every cell that is not known, seed by seed, variant by variant."""
    there = {(cell.panel, cell.label, cell.delay_steps, cell.seed) for cell in known}
    wanted = [
        (seed, curve, delay)
        for seed in range(given.seeds)
        for variant in given.variants
        for curve in CURVES
        if curve.variant == variant and curve.panel in given.panels
        for delay in DELAYS
        if (curve.panel, curve.label, delay, seed) not in there
    ]
    if not wanted:
        return
    more = changes_of(given)
    with connected(), ProgressBar("asynchrony", total=len(wanted), unit="cells") as bar:
        data = RunFolder.open(root / "data", config_of(domain, "late", 0, more))
        stages.record(data)
        # The first policy decodes the pictures for all.
        data.path("frames").mkdir(exist_ok=True)
        with SimulatorPool(data.config.sim, data.config.data.image_size, available_cpus()) as pool:
            for seed, curve, delay in wanted:
                own = {**more, "data.root": str(data.dataset)}
                folder = RunFolder.open(root / f"{curve.variant}-{seed}", config_of(domain, curve.variant, seed, own))
                folder.share_frames(data.path("frames"))
                yield measure(folder, curve, delay, given.episodes, pool)
                bar.to(bar.count + 1)


def measure(folder: RunFolder, curve: Curve, delay: int, episodes: int, pool: SimulatorPool) -> Cell:
    """One cell; the policy is trained where it is not yet."""
    load = trained(folder, cloning=VARIANTS[curve.variant].cloning)
    config = override(
        cell_config(folder.config, curve, delay, episodes), {"evaluate.checkpoint": str(folder.path("checkpoint"))}
    )
    cell = RunFolder.open(folder.path("cells") / f"{curve.slug}-{delay}", config)
    if not cell.done("evaluate"):
        with cell.stage("evaluate") as clock:
            evaluation.evaluate(cell, clock, load, pool)
    results = sorted(read_evaluation(cell).results, key=lambda result: (result.task, result.seed))
    ages = [age for result in results for age in result.intent_age_steps]
    won = {task: [r for r in results if r.task == task] for task in config.sim.tasks}
    return Cell(
        panel=curve.panel,
        label=curve.label,
        delay_steps=delay,
        seed=config.train.seed,
        cpu=describe_hardware().cpu,
        outcomes={task: "".join("1" if r.success and r.error is None else "0" for r in of) for task, of in won.items()},
        held_share=sum(r.held_actions for r in results) / max(1, sum(r.steps for r in results)),
        intent_age_p50=float(np.median(ages)) if ages else None,
        train_s=folder.wall_s("train"),
    )


def trained(folder: RunFolder, *, cloning: bool) -> Load:
    """How a cell gets the folder's policy, trained first where it is not yet."""
    if cloning:
        data = TrainingData.open(folder.config, folder.dataset, folder.path("frames"))
        policy, _ = baseline.train(folder, data, "l1", CLONING_CPU_S, time.process_time)
        return lambda *_: (policy, folder.config)
    if not folder.done("train"):
        with folder.stage("train") as clock:
            train_until(folder, folder.config.train.steps, clock)
    return load_trained


def changes_of(given: argparse.Namespace) -> dict[str, Any]:
    """Settings of all policies by the command line."""
    changes: dict[str, Any] = dict(pair.split("=", 1) for pair in given.set)
    return {**({"train.steps": given.steps} if given.steps else {}), **changes}


def kept(out: Path, settings: Json) -> list[Cell]:
    """The cells of an earlier result of the same settings.

    Raises:
        ValueError: it has others.
    """
    study = earlier(out, Study, settings)
    return [] if study is None else list(study.cells)


def main() -> None:
    """Run the study, or go on with it; tables and plot are written anew after every cell."""
    parser = command_line("asynchrony", __doc__)
    parser.add_argument("domain", choices=DOMAINS, help="five Meta-World tasks, or three at the table")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of every policy (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=20, help="per task and cell (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="policies (default: all)")
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=list(PANELS), help="pictures (default: all)")
    parser.add_argument("--steps", type=int, help="optimiser steps of every policy (default: the preset's)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of every policy")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder for the work (default: runs)")
    parser.add_argument("--out", type=Path, help="JSON to write (default: benchmarks/results/asynchrony_<domain>.json)")
    parser.add_argument("--show", action="store_true", help="only write tables and plot of what is measured anew")
    given = parser.parse_args()
    out = given.out or RESULTS / f"asynchrony_{given.domain}.json"
    domain, root = DOMAINS[given.domain], given.runs / f"asynchrony-{given.domain}"
    settings = {"episodes": given.episodes, "evaluate.seed": SEED, **changes_of(given)}
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        for variant in VARIANTS:
            config_of(domain, variant, 0, changes_of(given))
        cells = kept(out, settings)
    except ValueError as mistake:
        parser.error(str(mistake))
    page = out.parent.resolve() == RESULTS
    if not given.show:
        with locked(root):
            for cell in run(domain, root, list(cells), given):
                cells.append(cell)
                write_result(out, {**origin(), "settings": settings, "cells": [plain(each) for each in cells]})
                publish(out, given.domain, cells, page=page)
                print(f"\n{cell.panel}, {cell.label}, {cell.delay_steps} late, seed {cell.seed}: {cell.rate:.2f}", flush=True)
    print(publish(out, given.domain, cells, page=page))


if __name__ == "__main__":
    main()
