"""One trial: train, be evaluated in closed loop at every rung, report; resumable at every point, and it fails alone."""

import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune

from libra_ray import checkpoint
from libra_ray.common.disk import NoRoomError, explained, lacks_room
from libra_ray.common.files import append_jsonl, repair_jsonl
from libra_ray.common.json_text import plain
from libra_ray.config import Config, SimConfig, inference_settings, override
from libra_ray.control.margin import measure
from libra_ray.evaluation.log import read_evaluation
from libra_ray.on_ray import evaluate as evaluation
from libra_ray.on_ray import stages
from libra_ray.on_ray import train as training
from libra_ray.on_ray.run_data import keep, open_to_train
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.on_ray.sweep.sweep_folder import FULL, RUNGS_NAME, TrialFolder, TrialProcess, WrittenOrder
from libra_ray.policy import load_policy
from libra_ray.runs.folder import Clock, RunFolder
from libra_ray.runs.results import SPEED, TrainingLog
from libra_ray.runs.trials import Rung, TrialResult
from libra_ray.training.fit import Trainer
from libra_ray.training.saving import BackgroundSaver

LEFT_OUT = ("lr", "weight_", *SPEED)
"""Beginnings of the logged names that measure no policy."""
GRADIENTS = "grad_"
LONGEST_ERROR = 4000
NO_ROOM = "no_room"
"""In the last report of a trial that met a full disk: the line that says so."""

_POOLS: dict[tuple[SimConfig, int, int], SimulatorPool] = {}
"""The simulators of this process: its trials follow one another and share them. They end with the process that started them."""


def run_trial(given: dict[str, Any]) -> None:
    """The function that Ray Tune runs: reports `success` and the offline measures at every `budget` (ninths of the steps).

    An exception becomes the trial's result and disturbs no other trial; Tune hears of it as a success that is not a number.
    A full disk is no fault of the trial's: it stays unfinished, and the sweep is told in `NO_ROOM`.

    Args:
        given: a `TrialProcess`, by field.
    """
    process = TrialProcess(**given)
    trial = TrialFolder(root=Path(process.trial))
    torch.set_num_threads(process.threads)
    try:
        with explained(trial.root):
            _to_its_end(trial, process)
    except NoRoomError as full:
        close_pools()
        tune.report({"success": float("nan"), "budget": FULL, NO_ROOM: str(full)})


def _to_its_end(trial: TrialFolder, process: TrialProcess) -> None:
    """Work on a trial until it has a result, and report what was not reported."""
    result = trial.result()
    # One that has ended before replays what it said, for a scheduler that has not heard it.
    said = 0
    if result is None:
        try:
            result = _work(trial, process.simulator_actors)
        except Exception as error:
            if lacks_room(error):
                raise
            close_pools()
            result = _failed(trial, error)
        trial.end(result)
        said = len(result.rungs) - (result.status == "finished")
    for rung in result.rungs[said:]:
        tune.report(plain(rung))
    if result.status == "failed":
        tune.report({"success": float("nan"), "budget": FULL})


def _work(trial: TrialFolder, simulator_actors: int) -> TrialResult:
    """All rungs that were not reached before; those that were are reported again."""
    spec = trial.spec()
    folder = RunFolder.open(trial.root, spec.config_with(simulator_actors=simulator_actors))
    bind(folder, spec)
    repair_jsonl(folder.path(RUNGS_NAME))
    known = {rung.budget: rung for rung in trial.rungs()}
    for budget in spec.budgets:
        if budget not in known:
            known[budget] = _reach(folder, budget, spec.rung_episodes)
            append_jsonl(folder.path(RUNGS_NAME), [plain(known[budget])])
        if budget < FULL:
            tune.report(plain(known[budget]))
    return _finished(folder, spec, list(known.values()))


def bind(folder: RunFolder, spec: WrittenOrder) -> None:
    """Let a trial's folder share the sweep's pictures, and train on the sweep's data set alone, as it was at the beginning."""
    folder.share_frames(Path(spec.frames))
    if spec.data is not None:
        keep(folder, spec.data)


def _reach(folder: RunFolder, budget: int, episodes: int) -> Rung:
    """Train to a rung and measure there."""
    config = folder.config
    step = rung_step(config, budget)
    with folder.stage("train") as clock:
        train_until(folder, step, clock)
    if budget == FULL:
        stage = folder
    else:
        # Other seeds than at the end, and as many for every trial: what is chosen here is not judged on the same episodes.
        changes = {
            "evaluate.checkpoint": str(folder.path("checkpoint")),
            "evaluate.seed": config.evaluate.seed + config.evaluate.episodes_per_task,
            "evaluate.episodes_per_task": episodes,
            "evaluate.controllers": "policy",
        }
        stage = RunFolder.open(folder.path("rungs") / str(budget), override(config, changes))
    with stage.stage("evaluate") as clock:
        evaluation.evaluate(stage, clock, pool=_pool(config))
    played = _episodes(stage, "policy")
    return Rung(
        budget=budget,
        step=step,
        success=_success(played),
        latency_ms=latency_ms(folder),
        episodes=sum(len(task) for task in played.values()),
        wall_s=round(folder.wall_s("train") + folder.wall_s("evaluate"), 2),
        measures=measures(stages.training_log(folder)),
    )


def rung_step(config: Config, budget: int) -> int:
    """The optimiser step of a rung: that share of the steps, up to the next row of the log."""
    every = config.train.log_every
    return min(config.train.steps, -(-config.train.steps * budget // (FULL * every)) * every)


def train_until(folder: RunFolder, step: int, clock: Clock) -> None:
    """Train to `step`: in this process where one worker suffices, with Ray Train's workers otherwise; exactly resumable."""
    if folder.config.ray.train_workers > 1:
        training.train(folder, clock, until=step)
        return
    config, last = folder.config, folder.path("ray") / "last"
    data = open_to_train(folder)
    torch.manual_seed(config.train.seed)
    device = torch.device(evaluation.device_of(config))
    state = checkpoint.load_trainer_state(last) if last.exists() else None
    trainer = Trainer(data.make_model(begun=state is not None).to(device), device=device, state=state)

    with BackgroundSaver(trainer, data) as saver:

        def save(_: dict[str, float]) -> None:
            saver.begin(last)
            clock.tick()

        training.advance(trainer, data, folder.root, until=step, save=save, check=saver.check)
    checkpoint.export(last, folder.path("checkpoint"))


def _pool(config: Config) -> SimulatorPool:
    """This process's simulators for a configuration; others are ended first."""
    key = (config.sim, config.data.image_size, config.ray.simulator_actors)
    if key not in _POOLS:
        close_pools()
        # While the robots move, this process waits: they use the CPUs that it has reserved.
        _POOLS[key] = SimulatorPool(*key, cpus_each=0)
    return _POOLS[key]


def close_pools() -> None:
    """End this process's simulators."""
    while _POOLS:
        _POOLS.popitem()[1].__exit__()


def latency_ms(folder: RunFolder) -> float:
    """Inference time per executed control step of one robot, milliseconds.

    Medians of every level's calls, each divided by the steps that its answer is used for.
    """
    device, changes = evaluation.device_of(folder.config), inference_settings(folder.config)
    policy = load_policy(folder.path("checkpoint"), device, changes=changes)
    covers = {level.name: level.covers for level in policy.levels}
    covers[policy.levels[-1].name] = folder.config.control.execute_steps or policy.levels[-1].covers
    return sum(latency.p50_ms / covers[name] for name, latency in measure(policy, policy.blank()).items())


def _episodes(folder: RunFolder, controller: str) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for result in sorted(read_evaluation(folder).results, key=lambda r: (r.task, r.seed)):
        if result.controller == controller:
            found.setdefault(result.task, []).append(result.success and result.error is None)
    return found


def _success(episodes: dict[str, list[bool]]) -> float:
    return float(np.mean([np.mean(task) for task in episodes.values()]))


def measures(log: TrainingLog) -> dict[str, float]:
    """The last known value of every offline measure, and the median of each gradient norm over the last tenth of the log."""
    names = [name for name in log.names if not name.startswith(LEFT_OUT)]
    known = {name: log.late_median(name) if name.startswith(GRADIENTS) else log.last(name) for name in names}
    return {name: value for name, value in known.items() if value is not None}


def _finished(folder: RunFolder, spec: WrittenOrder, reported: list[Rung]) -> TrialResult:
    controllers = folder.config.evaluate.controllers
    last = reported[-1]
    errors = {name: _position_error(folder, name) for name in controllers}
    return TrialResult(
        number=spec.number,
        seed=spec.seed,
        values=spec.values,
        status="finished",
        episodes={name: _episodes(folder, name) for name in controllers},
        measures=measures(stages.training_log(folder)),
        latency_ms=last.latency_ms,
        position_error_mm={name: error for name, error in errors.items() if error is not None},
        rungs=reported,
        wall_s=last.wall_s,
    )


def _position_error(folder: RunFolder, controller: str) -> float | None:
    results = [r for r in read_evaluation(folder).results if r.controller == controller]
    errors = [r.position_error_mm for r in results if r.position_error_mm is not None]
    return float(np.mean(errors)) if errors else None


def _failed(trial: TrialFolder, error: Exception) -> TrialResult:
    (trial.root / "error.txt").write_text("".join(traceback.format_exception(error))[-LONGEST_ERROR:], encoding="utf-8")
    spec = trial.spec()
    return TrialResult(
        number=spec.number,
        seed=spec.seed,
        values=spec.values,
        status="failed",
        rungs=trial.rungs(),
        error=f"{type(error).__name__}: {error}"[:LONGEST_ERROR],
    )
