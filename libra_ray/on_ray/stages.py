"""The stages of the main job, each resumable and none done twice."""

import sys

from libra_ray import checkpoint
from libra_ray.data.dataset import open_dataset
from libra_ray.on_ray import evaluate as evaluation
from libra_ray.on_ray import evaluation_log
from libra_ray.on_ray import record as recording
from libra_ray.on_ray import train as training
from libra_ray.publish import publish_evaluation, publish_training
from libra_ray.results import TrainingLog
from libra_ray.run_folder import RunFolder, Stage
from libra_ray.sim import check_tasks
from libra_ray.tracking import Tracker
from libra_ray.types import Json


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
        if config.data.root or "record" not in stages:
            open_dataset(folder.dataset)
    if "evaluate" in stages:
        made_before = config.evaluate.checkpoint or "train" not in stages
        evaluation.check_fits(config, checkpoint.read_config(folder.checkpoint) if made_before else config)


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
