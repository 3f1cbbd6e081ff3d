"""The sweep itself: record once, run the trials with Ray Tune, leave nothing behind."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by Ray Tune when a run begins: no files and no words beside ours, no change of folder, and Ctrl-C stays the job's.
os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1"}

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup, PlacementGroupID

from libra_ray.common.disk import NoRoomError
from libra_ray.common.progress import ProgressBar, print_status
from libra_ray.config import Config, override
from libra_ray.model.ignored import given, remark, without_effect
from libra_ray.on_ray import stages
from libra_ray.on_ray.run_data import open_to_train
from libra_ray.on_ray.session import available_cpus
from libra_ray.on_ray.sweep.searcher import TrialSearcher, make_source
from libra_ray.on_ray.sweep.space import CHECKED_DRAWS, Space
from libra_ray.on_ray.sweep.sweep_folder import BUDGETS, FULL, REDUCTION, SweepFolder, TrialFolder
from libra_ray.on_ray.sweep.trial import run_trial
from libra_ray.runs.folder import RunFolder
from libra_ray.runs.trials import Settings, TrialResult

Ended = Callable[[TrialFolder, TrialResult], None]

REFUSED = {
    "pbt": "population-based training copies weights between running trials through Tune's checkpoints, which a function that "
    "drives Ray Train does not use: it would run, report, and change nothing; give --scheduler asha or fifo",
}
"""Schedulers that would do nothing on this engine, with the reason."""


def check(root: Path, config: Config, name: str, space: Space) -> None:
    """Refuse what can be known to be wrong before anything is started or written.

    Args:
        root: the sweep's folder, which need not exist yet.
        config: what every trial starts from.
        name: the scheduler.
        space: whose systems and pretrained models are asked once, each.

    Raises:
        ValueError: a scheduler that there is not, or that would do nothing; a task, data set or model that is not there.
    """
    if name in REFUSED:
        raise ValueError(f"--scheduler {name} is refused: {REFUSED[name]}")
    if name not in BUDGETS:
        raise ValueError(f"no --scheduler {name}; there are {', '.join(sorted(BUDGETS))}")
    if config.evaluate.policy_replicas:
        raise ValueError(
            f"evaluate.policy_replicas={config.evaluate.policy_replicas} has no place in a sweep: each trial evaluates its "
            "policy in its own process, on what the trial has reserved; leave it out"
        )
    _check_dials(config, space)
    for variant in space.loads(override(config, {"evaluate.controllers": "policy"})):
        stages.check(RunFolder(root.resolve(), variant), "record", "train", "evaluate")


def _check_dials(config: Config, space: Space) -> None:
    """Refuse a space of another system than the given one; say what of both has no effect.

    Raises:
        ValueError: the space tries other systems, or nothing that it varies means anything to the system.
    """
    system, names = config.model.system, list(space.domains)
    decided, tried = given(config, names), [override(config, point) for point in space.draws(CHECKED_DRAWS, seed=0)]
    systems = sorted({each.model.system for each in tried})
    if "model.system" in decided and system not in systems:
        raise ValueError(
            f"space {space.name} is for model.system={', '.join(systems)}, not for {system}; leave one of them out"
        )
    if decided:
        print_status(f"sweep: {remark(decided, config, f'beside space {space.name}, which decides on them')}")
    idle = [set(without_effect(names, each)) for each in tried]
    if nothing := [name for name in names if all(name in of for of in idle)]:
        text = f"no effect with model.system={', '.join(systems)}: {', '.join(nothing)}"
        if len(nothing) == len(names):
            raise ValueError(f"space {space.name} varies nothing else than what has {text}; give another space")
        print_status(f"sweep: {text}, which space {space.name} varies")


@dataclass(frozen=True, kw_only=True)
class TrialResources:
    """The cluster's resources for one trial.

    Attributes:
        concurrent: trials at a time.
        cpus: reserved per trial; as many threads and simulators it has.
        gpus: reserved per trial, a share where several have one.
    """

    concurrent: int
    cpus: int
    gpus: float


def trial_resources(config: Config, concurrent: int = 0) -> TrialResources:
    """Resources per trial, derived from the connected cluster's.

    Without a GPU a trial has one CPU (`ray.train_cpus_per_worker` changes that): several small trials side by side use
    the machine better than one with many threads. With `ray.use_gpu` there is a trial per GPU, or `concurrent` that share them.

    Raises:
        ValueError: the cluster cannot hold a single trial, or not `concurrent`.
    """
    cpus, gpus, workers = available_cpus(), ray.cluster_resources().get("GPU", 0), config.ray.train_workers
    each = max(1, int(config.ray.train_cpus_per_worker))
    if config.ray.use_gpu and not gpus:
        raise ValueError("ray.use_gpu=true, but the cluster has no GPU; leave it out")
    own, beside = (1, workers * each) if workers > 1 else (each, 0)
    fits = cpus // (own + beside)
    if config.ray.use_gpu:
        fits = min(fits, int(gpus) // workers if workers > 1 else concurrent or int(gpus))
    if fits < max(1, concurrent):
        raise ValueError(
            f"{concurrent or 1} trials at a time want {max(1, concurrent) * (own + beside)} CPUs, the cluster has {cpus} "
            f"and {gpus:g} GPUs; lower --concurrent, ray.train_workers or ray.train_cpus_per_worker"
        )
    number = concurrent or fits
    if config.ray.use_gpu and workers == 1:
        return TrialResources(concurrent=number, cpus=max(own, cpus // number), gpus=min(1.0, gpus / number))
    return TrialResources(concurrent=number, cpus=own, gpus=0)


def run(sweep: SweepFolder, ended: Ended = lambda *_: None) -> None:
    """Run every trial that has not ended; the cluster must be connected.

    Args:
        ended: told of every trial that ends, replayed ones included.

    Raises:
        ValueError: the cluster is too small.
        NoRoomError: a trial met a full disk.
    """
    config, settings = sweep.run.config, sweep.settings
    resources = trial_resources(config, settings.concurrent)
    with sweep.run.stage("total") as clock, _placement_groups_removed(), _bar(sweep) as bar:
        _record(sweep)
        left_s = settings.hours * 3600 - sweep.run.wall_s("total")

        def told(trial: TrialFolder, result: TrialResult) -> None:
            clock.tick()
            ended(trial, result)
            success = result.success_of()
            bar.to(len(sweep.results()), **({} if success is None else {"success": success}))

        searcher = TrialSearcher(
            sweep,
            make_source(sweep),
            threads=resources.cpus,
            simulator_actors=config.ray.simulator_actors or resources.cpus,
            deadline=time.monotonic() + left_s if settings.hours else None,
            ended=told,
        )
        _tuner(sweep, searcher, resources).fit()
        if searcher.no_room:
            raise NoRoomError(f"{searcher.no_room}; with --resume the sweep goes on")


class OutOfRoom(tune.Stopper):
    """Stops the other trials, which have the same disk, as soon as one has met its end."""

    def __init__(self, searcher: TrialSearcher) -> None:
        self._specs = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped alone."""
        return False

    def stop_all(self) -> bool:
        """Whether the disk is full."""
        return bool(self._specs.no_room)


def _bar(sweep: SweepFolder) -> ProgressBar:
    return ProgressBar("sweep", total=sweep.settings.trials * sweep.settings.seeds, unit="trials")


def _record(sweep: SweepFolder) -> None:
    """Demonstrations and decoded pictures, once for all trials that agree on them; the same ones at every start."""
    for config in sweep.space.recordings(sweep.run.config):
        data = sweep.data(config)
        folder = RunFolder.open(data.root, data.config)
        stages.record(folder)
        open_to_train(folder)


def _tuner(sweep: SweepFolder, searcher: TrialSearcher, resources: TrialResources) -> tune.Tuner:
    settings, folder = sweep.settings, sweep.run.path("tune")
    # Of no use after its run: the trials' folders are the state.
    shutil.rmtree(folder, ignore_errors=True)
    bundle = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    return tune.Tuner(
        tune.with_resources(run_trial, tune.PlacementGroupFactory([bundle])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler(settings),
            num_samples=settings.trials * settings.seeds,
            max_concurrent_trials=resources.concurrent,
            # The next trial finds torch imported and the simulators running.
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            stop=OutOfRoom(searcher),
            # An exception is the trial's result; what is tried again is a process that died, from its last checkpoint.
            failure_config=tune.FailureConfig(max_failures=sweep.run.config.ray.max_failures),
            verbose=0,
        ),
    )


def scheduler(settings: Settings) -> TrialScheduler:
    """Ray Tune's scheduler of that name."""
    if settings.scheduler == "fifo":
        return FIFOScheduler()
    first = BUDGETS["asha"][0]
    return AsyncHyperBandScheduler(
        time_attr="budget", metric="success", mode="max", grace_period=first, max_t=FULL, reduction_factor=REDUCTION
    )


def own_placement_groups() -> list[str]:
    """Ids of the placement groups of this driver that still hold, or wait for, resources."""
    job = ray.get_runtime_context().get_job_id()
    return [name for name, row in placement_group_table().items() if name.endswith(job) and row["state"] != "REMOVED"]


@contextmanager
def _placement_groups_removed() -> Iterator[None]:
    """Remove the block's placement groups at its end; Tune forgets some of them where it is interrupted."""
    before = set(own_placement_groups())
    try:
        yield
    finally:
        if ray.is_initialized():
            for name in set(own_placement_groups()) - before:
                remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))
