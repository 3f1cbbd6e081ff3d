"""Training on Ray Train: one or more workers, CPU or GPU by configuration, restarted from the last checkpoint after a fault."""

import copy
import gc
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from libra_ray import checkpoint
from libra_ray import config as configuration
from libra_ray.common import disk
from libra_ray.common.files import read_jsonl, repair_jsonl, write_text
from libra_ray.common.json_text import dump, read
from libra_ray.common.progress import ProgressBar
from libra_ray.control.margin import Margin, margins, measure
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.model.system import System
from libra_ray.on_ray import faults
from libra_ray.on_ray.ray_private import torch_trainer
from libra_ray.on_ray.run_data import open_to_train
from libra_ray.on_ray.session import is_private
from libra_ray.on_ray.workers import scaling
from libra_ray.policy import SystemPolicy
from libra_ray.runs.folder import Clock, RunFolder
from libra_ray.runs.results import LoggedStep, TrainingLog, log_step
from libra_ray.training.data import TrainingData
from libra_ray.training.fit import Save, Trainer
from libra_ray.training.saving import BackgroundSaver

TRAIN_NAME = "train"
LOG_NAME = "train_log.jsonl"
MARGINS_NAME = "margins.json"
ERRORS_NAME = "train_errors.log"
CHECKPOINT = "checkpoint_"
"""Begins the names of the folders to resume from."""
KEPT = 2
"""Checkpoints to resume from; one more is there while it is written."""
SHOWN = "loss_", "samples_per_s"
"""Beginnings of the names of the metrics beside the progress bar."""


def train(folder: RunFolder, clock: Clock, until: int | None = None) -> checkpoint.Manifest:
    """Train the run's policy, or continue where it stopped, and put the checkpoint into the run's folder.

    Args:
        until: an optimiser step to stop at for now (a logged one); None means the last.

    Raises:
        ValueError: the data set cannot be trained on (see `TrainingData.open`).
        RuntimeError: training ended before its last step, by an error that would come again, or because workers were lost
            more often than `ray.max_failures`.
    """
    # Decoding and checking happen once, here: a bad data set is refused before any worker starts.
    data = open_to_train(folder)
    repair_jsonl(folder.path(LOG_NAME))
    trainer = torch_trainer(
        alone=is_private(),
        train_loop_per_worker=train_loop,
        train_loop_config={
            "config": configuration.to_json(folder.config),
            "folder": str(folder.root),
            "dataset": str(folder.dataset),
            # A worker that is started again later must find this data set and no other.
            "data": asdict(data.fingerprint),
            "until": until or folder.config.train.steps,
        },
        scaling_config=scaling(folder.config),
        torch_config=TorchConfig(backend="nccl" if folder.config.ray.use_gpu else "gloo"),
        run_config=RunConfig(
            name=TRAIN_NAME,
            storage_path=str(folder.path("ray")),
            failure_config=FailureConfig(max_failures=folder.config.ray.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
            callbacks=[faults.EndAtOnce()],
        ),
    )
    try:
        result = _fitted(trainer, folder, clock)
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(faults.ended(error, folder.path(ERRORS_NAME), folder.config.ray.max_failures)) from error
    assert result.checkpoint is not None, "the last step always saves"
    with result.checkpoint.as_directory() as saved:
        return checkpoint.export(Path(saved), folder.path("checkpoint"))


def train_loop(settings: dict[str, Any]) -> None:
    """What every training worker runs.

    Raises:
        LastingError: by the first error that another try would not mend.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    rank = ray.train.get_context().get_world_rank()
    with faults.lasting_errors_logged(Path(settings["folder"]) / ERRORS_NAME, rank):
        _train(settings, rank)


def _train(settings: dict[str, Any], rank: int) -> None:
    """The data, the model, `Trainer`, and a report to Ray at every checkpoint."""
    config, root = configuration.from_json(settings["config"]), Path(settings["folder"])
    # Without it, memory that is free in pieces cannot be had as a whole.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = ray.train.torch.get_device()
    before = Fingerprint(**settings["data"])
    data = TrainingData.open(config, Path(settings["dataset"]), root / "frames", before)
    torch.manual_seed(config.train.seed)
    last = ray.train.get_checkpoint()
    # A run's folder lies where all workers see it.
    state = None if last is None else checkpoint.load_trainer_state(last.path)
    model = data.make_model(begun=state is not None)
    if rank == 0 and state is None:
        write_text(root / MARGINS_NAME, dump(margins_of(copy.deepcopy(model), data, device)))
    trainer = Trainer(model, device=device, state=state)
    if rank == 0:
        remove_unfinished(root)
        check_room(root, trainer.checkpoint_bytes())
    with BackgroundSaver(trainer, data) as saver:

        def save(metrics: dict[str, float]) -> None:
            row = {"step": trainer.step, **metrics}
            folder = _checkpoints(root) / f"{CHECKPOINT}{trainer.step:08d}_{uuid.uuid4().hex[:8]}"
            saver.begin(folder, lambda saved: _report(row, saved))

        advance(trainer, data, root, until=settings["until"], save=save, check=saver.check)
        if state is not None and trainer.step >= settings["until"] and trainer.step == state["step"]:
            # Every rank reports equally often: a run that was already finished says so once, with the checkpoint it has.
            save({})


def margins_of(model: System, data: TrainingData, device: torch.device) -> list[Margin]:
    """Whether the levels of a model, which is then the policy's, will keep up with one robot, measured here.

    Before the first step: how long a level takes does not depend on its weights, and so it is known before time is spent on
    what could not be used. A few calls cost nothing beside training; loading the trained model once more, perhaps on a machine
    without this GPU, would.
    """
    config, spec = data.config, data.spec
    manifest = checkpoint.Manifest(
        step=0,
        total_steps=config.train.steps,
        shape=spec.shape,
        image_keys=spec.image_keys,
        control_hz=spec.control_hz,
        instructions=spec.instructions,
        digest="",
    )
    policy = SystemPolicy(checkpoint.Checkpoint(model=model, config=config, stats=data.stats, manifest=manifest), device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        latencies = measure(policy, policy.blank())
    found = margins(policy.levels, latencies, spec.control_hz, config.control, policy.lengthened_by)
    if device.type == "cuda":
        # Its networks and recordings know one another: without this a GPU would hold them until memory runs out.
        del policy, model
        gc.collect()
        torch.cuda.empty_cache()
    return found


def read_margins(root: Path) -> list[Margin]:
    """What was measured before the training of a run; empty where nothing was."""
    path = root / MARGINS_NAME
    return read(list[Margin], path) if path.exists() else []


def check_room(root: Path, size: int) -> None:
    """Refuse a run whose checkpoints of `size` bytes will not fit.

    Raises:
        NoRoomError: names the folder, what is needed and what is free.
    """
    disk.check_room(root, (KEPT + 1) * size - disk.bytes_below(root / "ray"), f"training with {KEPT + 1} checkpoints at a time")


def remove_unfinished(root: Path) -> None:
    """Remove what workers that were lost left of checkpoints; ask before anything is reported."""
    known = {Path(each.checkpoint.path).name for each in ray.train.get_all_reported_checkpoints()}
    for folder in [path for path in _checkpoints(root).iterdir() if path.is_dir()]:
        if folder.name.lstrip(".").startswith(CHECKPOINT) and folder.name not in known:
            shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(root: Path) -> Path:
    """Where Ray Train keeps a run's checkpoints."""
    return root / "ray" / TRAIN_NAME


def advance(trainer: Trainer, data: TrainingData, root: Path, until: int, save: Save, check: Callable[[], None]) -> None:
    """Train up to step `until`, with one row of the run's log at every logging step.

    Args:
        save: called wherever a checkpoint is due, and at `until`.
        check: called at every row; tells what failed in the background.
    """
    sharded = trainer.model.config.ray.parallel == "fsdp" and trainer.world > 1
    # A sharded model answers only when every worker asks.
    validate = data.validator(trainer.device) if trainer.rank == 0 or sharded else None
    if trainer.rank == 0:
        repair_jsonl(root / LOG_NAME)
        logged = TrainingLog.read(root / LOG_NAME).rows
        if trainer.row and (not logged or logged[-1].step < trainer.step):
            # It ended between the checkpoint and its row, perhaps by what the row was to measure.
            log_step(root / LOG_NAME, trainer.step, trainer.last_row(None if sharded else validate))
    if trainer.step >= until:
        return
    pin = trainer.device.type == "cuda"
    with data.stream(trainer.model, rank=trainer.rank, world=trainer.world, start_step=trainer.step, pin=pin) as batches:
        for progress in trainer.run(batches, validate, save, until):
            check()
            if trainer.rank == 0:
                log_step(root / LOG_NAME, progress.step, progress.metrics)


def _report(row: dict[str, float], folder: Path) -> None:
    """Tell Ray Train of a checkpoint that lies where it keeps them; it counts once every rank has."""
    ray.train.report(
        row,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
    )


def _fitted(trainer: TorchTrainer, folder: RunFolder, clock: Clock) -> ray.train.Result:
    """`TorchTrainer.trainer`, with the workers' log rows shown as progress.

    Not in the main thread, where Ray Train would take Ctrl-C for itself and end the program as if it had succeeded.
    """
    outcome: Future[ray.train.Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001  (raised where the outcome is read)
            outcome.set_exception(error)

    threading.Thread(target=run, name="train-fit", daemon=True).start()
    path, shown, ended, said = folder.path(LOG_NAME), 0, False, False
    with ProgressBar("train", total=folder.config.train.steps, unit="step") as bar:
        while not ended:
            ended = bool(wait([outcome], timeout=0.5).done)
            if not said and (found := read_margins(folder.root)):
                said = True
                for margin in found:
                    bar.say(margin.text)
            rows = read_jsonl(path, LoggedStep)
            if rows and rows[-1].step != shown:
                shown = rows[-1].step
                bar.to(shown, **{name: value for name, value in rows[-1].metrics.items() if name.startswith(SHOWN)})
            clock.tick()
    return outcome.result()
