"""The stages of the main job, each resumable and none done twice."""

import sys

from libra_ray import checkpoint
from libra_ray.config import Config
from libra_ray.data.dataset import Recorded, open_dataset
from libra_ray.model.dry_run import dry_run
from libra_ray.model.libra import RobotShape
from libra_ray.on_ray import evaluate as evaluation
from libra_ray.on_ray import evaluation_log
from libra_ray.on_ray import record as recording
from libra_ray.on_ray import train as training
from libra_ray.policy import load_policy
from libra_ray.publish import publish_evaluation, publish_training
from libra_ray.results import TrainingLog
from libra_ray.run_folder import RunFolder, Stage
from libra_ray.sim import check_tasks, instruction_of
from libra_ray.tracking import Tracker
from libra_ray.types import Json

SAMPLED_EPISODES = 50
"""Episodes of each task whose words are looked at before the start: the words are few, and drawn again and again."""


def say(text: str) -> None:
    """A plain line for whoever watches."""
    print(text, file=sys.stderr, flush=True)


def check(folder: RunFolder, *stages: Stage) -> None:
    """Refuse what can be known to be wrong before anything is started or written.

    Args:
        folder: the run's, which need not exist yet.
        stages: those that will run, each of which makes what the next one needs.

    Raises:
        ValueError: a task, data set or checkpoint that is not there or does not fit.
    """
    config = folder.config
    if ("record" in stages and not config.data.root) or "evaluate" in stages:
        check_tasks(config.sim, config.record.counted_tasks)
    if "train" in stages:
        if config.train.batch_size % config.ray.train_workers:
            raise ValueError(
                f"train.batch_size={config.train.batch_size} is not a multiple of ray.train_workers={config.ray.train_workers}"
            )
        if config.train.start_from and not folder.begun("train"):
            checkpoint.read_manifest(config.train.start_from)
        recorded = open_dataset(folder.dataset) if config.data.root or "record" not in stages else None
        check_model(folder, recorded, *stages)
    if "evaluate" in stages:
        made_before = config.evaluate.checkpoint or "train" not in stages
        evaluation.check_fits(config, checkpoint.read_config(folder.checkpoint) if made_before else config)
        if made_before:
            check_instructions(folder)


def check_model(folder: RunFolder, recorded: Recorded | None, *stages: Stage) -> None:
    """Ask the model to be trained for one answer, and whether it takes the words of every task it will meet.

    Args:
        folder: the run's.
        recorded: what it trains on, where that is there already.
        stages: those that will run.

    Raises:
        ValueError: see `dry_run`.
    """
    config = folder.config
    if folder.done("train"):
        return
    words = list(recorded.tasks if recorded else asked(config, config.record.seed))
    if "evaluate" in stages and not config.evaluate.checkpoint:
        words += asked(config, config.evaluate.seed)
    cameras = len(recorded.image_keys) if recorded else 1 + config.sim.wrist_camera
    dims = (recorded.action_dim, recorded.state_dim) if recorded else (1, 1)
    dry_run(config, RobotShape(action_dim=dims[0], state_dim=dims[1], cameras=cameras), words)


def check_instructions(folder: RunFolder) -> None:
    """Refuse tasks whose words the checkpoint to be evaluated does not take.

    Raises:
        ValueError: it cannot be loaded, or does not take one of them.
    """
    config = folder.config
    if not folder.done("evaluate") and set(config.evaluate.controllers) - {*evaluation.SCRIPTED}:
        policy = load_policy(folder.checkpoint)
        for instruction in asked(config, config.evaluate.seed):
            policy.tokenise(instruction)


def asked(config: Config, seed: int) -> list[str]:
    """What is asked for in the first episodes of every task, from that seed on."""
    seeds = range(seed, seed + SAMPLED_EPISODES)
    return list(dict.fromkeys(instruction_of(config.sim, task, s) for task in config.sim.tasks for s in seeds))


def record(folder: RunFolder) -> None:
    """Demonstrations into the run's data set, unless another one is configured."""
    if folder.config.data.root:
        say(f"record: nothing to do, data.root is {folder.config.data.root}")
    elif folder.done("record"):
        say(f"record: finished already, {folder.dataset.name} is complete")
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
        say(f"train: finished already, the checkpoint is at its last step {step}")
    else:
        with folder.stage("train") as clock:
            training.train(folder, clock)
    publish_training(folder, tracker, training_log(folder))


def evaluate(folder: RunFolder) -> None:
    """Evaluate the run's checkpoint in closed loop."""
    if folder.done("evaluate"):
        say("evaluate: finished already")
    else:
        with folder.stage("evaluate") as clock:
            evaluation.evaluate(folder, clock)


def report(folder: RunFolder, tracker: Tracker) -> Json:
    """Publish what was evaluated; returns the content of `report.json`."""
    return publish_evaluation(
        folder, tracker, training_log(folder), evaluation_log.read_evaluation(folder), evaluation_log.read_rollouts(folder)
    )


def pipeline(folder: RunFolder, tracker: Tracker, since: float) -> Json:
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
