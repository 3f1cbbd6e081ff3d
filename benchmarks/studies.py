"""What studies of trained policies share: settings of the command line, one recording, cells done once, and their figures."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from libra_ray.config import Config, override
from libra_ray.evaluation.log import read_evaluation
from libra_ray.on_ray import evaluate as evaluation
from libra_ray.on_ray import stages
from libra_ray.on_ray.evaluate import Load, load_trained
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.on_ray.sweep.trial import train_until
from libra_ray.runs.folder import RunFolder
from libra_ray.runs.results import EpisodeResult
from libra_ray.stats.granularity_peak import Estimate, Outcomes, estimate, paired_difference, success_draws


def changes_of(pairs: Sequence[str], varied: Collection[str]) -> dict[str, str]:
    """The settings of `--set NAME=VALUE ...`.

    Args:
        pairs: as given.
        varied: the settings that the study gives each policy itself.

    Raises:
        ValueError: one is no such pair, or sets what the study varies.
    """
    found = [pair.partition("=") for pair in pairs]
    for name, equals, _ in found:
        if not equals or name in varied:
            raise ValueError(f"--set {name}: give NAME=VALUE of a setting other than {' and '.join(varied)}")
    return {name: value for name, _, value in found}


def recorded(root: Path, config: Config) -> RunFolder:
    """The run of the demonstrations that all policies learn from, recorded first where it is not yet."""
    data = RunFolder.open(root, config)
    stages.record(data)
    # The first policy decodes the pictures for all.
    data.path("frames").mkdir(exist_ok=True)
    return data


def opened(root: Path, config: Config, data: RunFolder) -> RunFolder:
    """The run of a policy that learns from the demonstrations of `data`, whose pictures it shares."""
    folder = RunFolder.open(root, override(config, {"data.root": str(data.dataset)}))
    folder.share_frames(data.path("frames"))
    return folder


def train(folder: RunFolder) -> None:
    """Train the folder's policy in this process, or go on with it; nothing where it is finished."""
    if not folder.done("train"):
        with folder.stage("train") as clock:
            train_until(folder, folder.config.train.steps, clock)


def evaluated(folder: RunFolder, load: Load = load_trained, pool: SimulatorPool | None = None) -> list[EpisodeResult]:
    """The folder's episodes by controller, task and seed; those that were not run yet are run first."""
    if not folder.done("evaluate"):
        with folder.stage("evaluate") as clock:
            evaluation.evaluate(folder, clock, load, pool)
    return sorted(read_evaluation(folder).results, key=lambda result: (result.controller, result.task, result.seed))


def outcomes_of(results: Sequence[EpisodeResult], tasks: Sequence[str]) -> dict[str, str]:
    """Task -> an episode each, in the order given: `1` succeeded, `0` did not."""
    return {task: "".join("1" if r.succeeded else "0" for r in results if r.task == task) for task in tasks}


def won(outcomes: Mapping[str, str]) -> list[NDArray[np.bool_]]:
    """Whether each episode succeeded, an array per task."""
    return [np.array([outcome == "1" for outcome in of]) for of in outcomes.values()]


def success(seeds: Sequence[Outcomes]) -> Estimate:
    """Mean over training seeds and tasks, with its interval: seeds are resampled, then episodes."""
    mean = float(np.mean([np.mean([task.mean() for task in tasks]) for tasks in seeds]))
    return estimate(mean, success_draws(seeds, np.random.default_rng(0)))


def difference(ours: Mapping[int, Outcomes], theirs: Mapping[int, Outcomes]) -> Estimate | None:
    """How much more often the first succeed, episode by episode, over the seeds that both have; None without any."""
    pairs = [(outcomes, theirs[seed]) for seed, outcomes in ours.items() if seed in theirs]
    return paired_difference(pairs) if pairs else None


def words(found: Estimate | None, form: str = ".2f", until: str = "–") -> str:
    """A figure with its interval; a dash where there is none."""
    return "–" if found is None else f"{found.value:{form}} ({found.low:{form}}{until}{found.high:{form}})"
