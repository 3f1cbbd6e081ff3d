"""The stages of the main job, each resumable and none done twice."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from libra_ray import checkpoint
from libra_ray.common.folders import tidy
from libra_ray.common.progress import print_status
from libra_ray.config import Config
from libra_ray.data.dataset import Demonstrations, open_dataset
from libra_ray.data.features import robot_to_record
from libra_ray.evaluation import log as evaluation_log
from libra_ray.model.dry_run import dry_run
from libra_ray.model.ignored import (
    ignored_beside,
    ignored_in_evaluation,
    ignored_in_training,
    remark,
    remarks_in_evaluation,
    remarks_in_recording,
    remarks_in_training,
)
from libra_ray.model.system import System
from libra_ray.on_ray import evaluate as evaluation
from libra_ray.on_ray import record as recording
from libra_ray.on_ray import session
from libra_ray.on_ray import train as training
from libra_ray.on_ray.run_data import open_unchanged
from libra_ray.on_ray.run_policy import check_same_subject, keep_subject
from libra_ray.on_ray.workers import check_workers
from libra_ray.report.publish import check_store, publish_evaluation, publish_training
from libra_ray.report.records import Report
from libra_ray.runs.folder import RunFolder, Stage
from libra_ray.runs.results import TrainingLog
from libra_ray.sim import CANNOT_DRIVE, check_robot, check_tasks, instructions, robot_spec
from libra_ray.spec import RobotSpec, differences
from libra_ray.tracking import Tracker
from libra_ray.training.data import distinct_tokens, make_model, shape_of, stats_of
from libra_ray.training.parallel import check_sharded

DECLARING = "data.action_names, data.state_names, data.gripper, data.action_is and data.rotation"
"""Settings that say what the numbers of a data set mean."""


def check(folder: RunFolder, *stages: Stage, fresh: bool = False) -> None:
    """Refuse what can be known to be wrong before anything is started or written.

    Args:
        folder: the run's, which need not exist yet.
        stages: those that will run, each of which makes what the next one needs.
        fresh: what earlier starts of these stages left will be put aside, and counts for nothing.

    Raises:
        ValueError: a task, data set or checkpoint that is not there or does not fit; a RAY_ADDRESS that is none.
        RuntimeError: no cluster answers at RAY_ADDRESS.
    """
    config = folder.config
    tidy(folder.checkpoint)
    session.check()
    if "train" in stages or "evaluate" in stages:
        check_store(folder)
        evaluation.check_gpu(config)
    if "record" in stages and not config.data.root:
        recording.check_codec(config.record, config.data.image_size)
    if "record" in stages and (fresh or not folder.done("record")):
        _say("record", remarks_in_recording(config))
    if "evaluate" in stages:
        evaluation.check_resources(config)
    if ("record" in stages and not config.data.root) or "evaluate" in stages:
        check_tasks(config.sim, config.record.counted_tasks)
    recorded = _recorded(folder, stages, fresh=fresh) if "train" in stages else None
    model: System | None = None
    if "train" in stages:
        check_workers(config)
        if fresh or not folder.done("train"):
            read = _to_record(config) if recorded is None else recorded.instructions
            told = evaluation.evaluated_instructions(config) if "evaluate" in stages else ()
            model = _checked_model(folder, recorded, sorted({*read, *told}), begun=folder.begun("train") and not fresh)
            check_sharded(model)
            if names := ignored_in_training(config, apart=model.learned is not None):
                alone = f" and train.levels={','.join(config.train.levels)}" if model.learned is not None else ""
                _say("train", [remark(names, config, f"with model.system={config.model.system}{alone}")])
            _say("train", remarks_in_training(config))
    if "evaluate" in stages:
        own = "train" in stages and not config.evaluate.checkpoint
        _check_evaluation(folder, recorded if own else None, model if own else None, own=own, fresh=fresh)


def _check_evaluation(
    folder: RunFolder, recorded: Demonstrations | None, model: System | None, *, own: bool, fresh: bool
) -> None:
    """Refuse an evaluation that its policy, simulator or settings do not allow.

    Args:
        folder: the run's.
        recorded: the data set that its policy is trained on before; None where there is none yet, or another policy is meant.
        model: that policy, if it is not trained already.
        own: whether this run's training makes the policy.
        fresh: whether an evaluation that is over counts for nothing.
    """
    config = folder.config
    trained = config if own else checkpoint.read_config(folder.checkpoint)
    evaluation.check_fits(config, trained)
    if recorded is not None:
        _check_drives(config, recorded)
    elif own:
        check_robot(config.sim, _robot_to_record(config), "the data set to be recorded", f"leave out {DECLARING}")
    if not fresh:
        check_same_subject(folder)
    over = folder.done("evaluate") and not fresh
    if over or not set(evaluation.controllers_of(config, trained)) - set(evaluation.SCRIPTED):
        return
    if own and model is not None and model.learned is not None:
        raise ValueError(
            f"train.levels={','.join(config.train.levels)}: a policy of which not all levels learn cannot be evaluated; train "
            "the others too, with jobs/train.py, and put them together with jobs/join.py"
        )
    if not own:
        checkpoint.check_complete(folder.checkpoint, trained, checkpoint.read_manifest(folder.checkpoint))
        evaluation.check_drives(config, folder.checkpoint)
        if names := ignored_beside(config, trained):
            _say("evaluate", [remark(names, config, f"beside what {folder.checkpoint} has of its own")])
    if not (config.delay.trace or model is not None or folder.checkpoint.is_dir()):
        return
    levels = model.levels if model is not None else checkpoint.read_levels(folder.checkpoint)
    if config.delay.trace:
        evaluation.delays_of(config, levels)
    if names := ignored_in_evaluation(config, levels):
        _say("evaluate", [remark(names, config, "on a policy with these levels, under these delays")])
    _say("evaluate", remarks_in_evaluation(config))


def _say(stage: Stage, remarks: Iterable[str]) -> None:
    for line in remarks:
        print_status(f"{stage}: {line}")


def _recorded(folder: RunFolder, stages: Sequence[Stage], *, fresh: bool) -> Demonstrations | None:
    """The data set to train on; None where the run has yet to record it."""
    if "record" in stages and not folder.config.data.root and (fresh or not folder.done("record")):
        return None
    return open_dataset(folder.dataset, folder.config.data) if fresh else open_unchanged(folder)


def _check_drives(config: Config, recorded: Demonstrations) -> None:
    """Refuse data of another robot than the simulator's; say where its actions go further than the simulator lets them.

    Raises:
        ValueError: names what differs.
    """
    wrong = differences(recorded.robot, robot_spec(config.sim))
    mend = f"; what the data set says wrongly, say with {DECLARING}, or mend it in meta/info.json" if wrong else ""
    check_robot(config.sim, recorded.robot, f"data set {recorded.root}", CANNOT_DRIVE + mend)
    reach = np.abs(recorded.action).max(axis=0)
    if beyond := [f"action[{i}] up to {reach[i]:g}" for i in np.flatnonzero(reach > 1)]:
        print_status(
            f"evaluate: the simulator takes actions in [-1, 1] and cuts others; the data set goes beyond: {', '.join(beyond)}"
        )


def _checked_model(folder: RunFolder, recorded: Demonstrations | None, words: Sequence[str], *, begun: bool) -> System:
    """Make the model as training will, ask it once, and let it read every instruction."""
    config = folder.config
    shape = shape_of(_robot_to_record(config)) if recorded is None else shape_of(recorded.robot, recorded.subgoals.names)
    if config.train.stats_from:
        stats_of(Path(config.train.stats_from), shape)
    model = dry_run(lambda: make_model(config, shape, begun=begun))
    distinct_tokens(model.tokenise, words)
    return model


def _robot_to_record(config: Config) -> RobotSpec:
    """The robot of the demonstrations that will be recorded.

    Raises:
        ValueError: a setting that it does not allow.
    """
    return robot_to_record(robot_spec(config.sim), config.data)


def _to_record(config: Config) -> tuple[str, ...]:
    """The instructions of the demonstrations that will be recorded first; what failed attempts add is read before training."""
    most = max(config.record.episodes(task) for task in config.sim.tasks)
    return instructions(config.sim, range(config.record.seed, config.record.seed + most))


def record(folder: RunFolder) -> None:
    """Demonstrations into the run's data set, unless another one is configured."""
    if folder.config.data.root:
        print_status(f"record: nothing to do, data.root is {folder.config.data.root}")
    elif folder.done("record"):
        print_status(f"record: finished already, {folder.dataset.name} is complete")
    else:
        with folder.stage("record") as clock:
            recording.record(folder, clock)


def train(folder: RunFolder, tracker: Tracker) -> None:
    """Train the run's policy on its data set.

    Raises:
        ValueError: there is no data set, or none that can be trained on.
    """
    if folder.done("train"):
        step = checkpoint.read_manifest(folder.path("checkpoint")).step
        print_status(f"train: finished already, the checkpoint is at its last step {step}")
    else:
        with folder.stage("train") as clock:
            training.train(folder, clock)
    publish_training(folder, tracker, training_log(folder), training.read_margins(folder.root))


def evaluate(folder: RunFolder) -> None:
    """Evaluate the run's checkpoint in closed loop.

    Raises:
        ValueError: it is another one than the run's evaluation began with.
    """
    check_same_subject(folder)
    if folder.done("evaluate"):
        print_status("evaluate: finished already")
    else:
        with folder.stage("evaluate") as clock:
            keep_subject(folder)
            evaluation.evaluate(folder, clock)


def report(folder: RunFolder, tracker: Tracker) -> Report:
    """Publish what was evaluated; returns the content of `report.json`."""
    evaluated = evaluation_log.read_evaluation(folder)
    return publish_evaluation(
        folder,
        tracker,
        training_log(folder),
        evaluated,
        evaluation_log.read_rollouts(folder),
        # Before training one robot was answered at a time; of another checkpoint it says nothing.
        () if folder.config.evaluate.checkpoint else training.read_margins(folder.root),
        evaluation.margins_of(folder, evaluated),
    )


def pipeline(folder: RunFolder, tracker: Tracker, since: float) -> Report:
    """All stages and the report; `since` is when the job began, in `time.monotonic()` seconds."""
    if folder.done("total"):
        record(folder)
        train(folder, tracker)
        evaluate(folder)
        return report(folder, tracker)
    with folder.stage("total", since) as clock:
        record(folder)
        train(folder, tracker)
        evaluate(folder)
        clock.write(done=False)
        return report(folder, tracker)


def training_log(folder: RunFolder) -> TrainingLog:
    """The rows of the run's training so far."""
    return TrainingLog.read(folder.path(training.LOG_NAME))
