"""What is the split for? Success against a late network: planner and refiner, one network, and plain behaviour cloning.

In simulated time, by injected delays (`delay.*`), so that the answer does not depend on the machine. Every policy learns from
the same demonstrations and meets the same episodes; a stopped study goes on where it stopped. `asynchrony_page.py` says what
the curves are and draws them.

    uv run -m benchmarks.asynchrony metaworld
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import baseline
from benchmarks.asynchrony_page import CURVES, DELAYS, DOMAINS, PANELS, VARIANTS, Cell, Curve, Domain, publish
from benchmarks.files import RESULTS, RUNS, command_line, earlier, origin, write_result
from benchmarks.pretraining import PRETRAINING, begins_with, pretrain
from benchmarks.studies import changes_of, evaluated, opened, outcomes_of, recorded, train
from libra_ray.common.json_text import plain
from libra_ray.common.progress import ProgressBar
from libra_ray.common.provenance import describe_hardware
from libra_ray.config import Config, override, preset
from libra_ray.on_ray.evaluate import Load, load_trained
from libra_ray.on_ray.session import available_cpus, connected
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.runs.folder import RunFolder, locked
from libra_ray.training.data import TrainingData
from libra_ray.types import Json

CLONING_STEPS = 3600
"""Optimiser steps of plain behaviour cloning: on two quiet cores 240 CPU seconds, as 1,500 steps of the others take."""
SEED = 400_000
PRETRAINED = "pretrained"
"""Folder of the backbone that a domain's systems begin with."""
VARIED = ("train.seed", "model.system")
"""What the study gives each policy itself."""


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
    more = settings_given(given)
    with connected(), ProgressBar("asynchrony", total=len(wanted), unit="cells") as bar:
        data = recorded(root / "data", config_of(domain, "late", 0, more))
        if domain.pretrained:
            pretrain(root / PRETRAINED, data, {}, quick=False)
        with SimulatorPool(data.config.sim, data.config.data.image_size, available_cpus()) as pool:
            for seed, curve, delay in wanted:
                config = config_of(domain, curve.variant, seed, begun(domain, curve.variant, root, more))
                folder = opened(root / f"{curve.variant}-{seed}", config, data)
                yield measure(folder, curve, delay, given.episodes, pool)
                bar.to(bar.count + 1)


def begun(domain: Domain, variant: str, root: Path, more: dict[str, Any]) -> dict[str, Any]:
    """Further settings of a policy: a system's begin with the domain's backbone, of which behaviour cloning has no part."""
    if not domain.pretrained or VARIANTS[variant].cloning:
        return more
    return more | begins_with(root / PRETRAINED, config_of(domain, variant, 0, more).model.system)


def measure(folder: RunFolder, curve: Curve, delay: int, episodes: int, pool: SimulatorPool) -> Cell:
    """One cell; the policy is trained where it is not yet."""
    load = trained(folder, cloning=VARIANTS[curve.variant].cloning)
    config = override(
        cell_config(folder.config, curve, delay, episodes), {"evaluate.checkpoint": str(folder.path("checkpoint"))}
    )
    cell = RunFolder.open(folder.path("cells") / f"{curve.slug}-{delay}", config)
    results = evaluated(cell, load, pool)
    ages = [age for result in results for age in result.intent_age_steps]
    return Cell(
        panel=curve.panel,
        label=curve.label,
        delay_steps=delay,
        seed=config.train.seed,
        cpu=describe_hardware().cpu,
        outcomes=outcomes_of(results, config.sim.tasks),
        held_share=sum(r.held_actions for r in results) / max(1, sum(r.steps for r in results)),
        intent_age_p50=float(np.median(ages)) if ages else None,
        train_s=folder.wall_s("train"),
    )


def trained(folder: RunFolder, *, cloning: bool) -> Load:
    """How a cell gets the folder's policy, trained first where it is not yet."""
    if cloning:
        data = TrainingData.open(folder.config, folder.dataset, folder.path("frames"))
        # Counted in steps, by a clock that ticks once a step: where others compute too, seconds are fewer steps.
        policy, _ = baseline.train(folder, data, "l1", CLONING_STEPS, count().__next__)
        return lambda *_: (policy, folder.config)
    train(folder)
    return load_trained


def settings_given(given: argparse.Namespace) -> dict[str, Any]:
    """Settings of all policies by the command line.

    Raises:
        ValueError: see `changes_of`.
    """
    return {**({"train.steps": given.steps} if given.steps else {}), **changes_of(given.set, VARIED)}


def settings_of(domain: Domain, episodes: int, more: dict[str, Any]) -> Json:
    """What every cell's result depends on, beside what its curve and policy have of their own."""
    began = {"pretraining": PRETRAINING} if domain.pretrained else {}
    found: Json = plain({"episodes": episodes, "evaluate.seed": SEED, **domain.changes, **began, **more})
    return found


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
    parser.add_argument("domain", choices=DOMAINS, help="five Meta-World tasks, three at the table, or two whose goal moves")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of every policy (default: %(default)s)")
    parser.add_argument("--episodes", type=int, help="per task and cell (default: the domain's)")
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
    given.episodes = domain.episodes if given.episodes is None else given.episodes
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        more = settings_given(given)
        settings = settings_of(domain, given.episodes, more)
        for variant in VARIANTS:
            config_of(domain, variant, 0, more)
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
