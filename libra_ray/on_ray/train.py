"""Training on Ray Train: one or more workers, CPU or GPU by configuration, restarted from the last checkpoint after a fault."""

import logging
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

from libra_ray import checkpoint
from libra_ray import config as configuration
from libra_ray.config import Config
from libra_ray.model.libra import Libra
from libra_ray.on_ray.session import available_cpus, is_private
from libra_ray.progress import Progress
from libra_ray.run_folder import Clock, RunFolder, append_jsonl, read_jsonl, repair_jsonl
from libra_ray.training import Fit
from libra_ray.training import Progress as Step
from libra_ray.training_data import TrainingData

TRAIN_NAME = "train"
LOG_NAME = "train_log.jsonl"
SHOWN = ("loss_plan", "loss_diff", "plan_accuracy", "samples_per_s")
"""Metrics beside the progress bar."""


def train(folder: RunFolder, clock: Clock, until: int | None = None) -> checkpoint.Manifest:
    """Train the run's policy, or continue where it stopped, and put the checkpoint into the run's folder.

    Args:
        until: an optimiser step to stop at for now (a logged one); None means the last.

    Raises:
        ValueError: the data set cannot be trained on (see `TrainingData.open`).
        ray.train.TrainingFailedError: the workers failed more often than `ray.max_failures`.
    """
    # Decoding and checking happen once, here: a bad data set is refused before any worker starts.
    TrainingData.open(folder.config, folder.dataset, folder.path("frames"))
    repair_jsonl(folder.path(LOG_NAME))
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "config": configuration.to_json(folder.config),
            "folder": str(folder.root),
            "dataset": str(folder.dataset),
            "until": until or folder.config.train.steps,
        },
        scaling_config=scaling(folder.config),
        torch_config=TorchConfig(backend="nccl" if folder.config.ray.use_gpu else "gloo"),
        run_config=RunConfig(
            name=TRAIN_NAME,
            storage_path=str(folder.path("ray")),
            failure_config=FailureConfig(max_failures=folder.config.ray.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    result = _fitted(trainer, folder, clock)
    assert result.checkpoint is not None, "the last step always saves"
    with result.checkpoint.as_directory() as saved:
        return checkpoint.export(Path(saved), folder.path("checkpoint"))


def scaling(config: Config) -> ScalingConfig:
    """Workers and what each reserves; without a given number, the workers share all CPUs of the cluster.

    Raises:
        ValueError: this machine's own cluster has fewer CPUs or GPUs than that: the workers would never start.
    """
    workers, cpus = config.ray.train_workers, available_cpus()
    each = {"CPU": config.ray.train_cpus_per_worker or max(1, cpus // workers)} | ({"GPU": 1} if config.ray.use_gpu else {})
    if is_private():
        _check_enough("CPU", workers * each["CPU"], cpus, "ray.train_workers, ray.train_cpus_per_worker")
        _check_enough(
            "GPU", workers * each.get("GPU", 0), ray.cluster_resources().get("GPU", 0), "ray.train_workers, ray.use_gpu"
        )
    return ScalingConfig(num_workers=workers, use_gpu=config.ray.use_gpu, resources_per_worker=each)


def _check_enough(kind: str, wanted: float, present: float, names: str) -> None:
    if wanted > present:
        raise ValueError(f"training wants {wanted:g} {kind}s, this machine gives Ray {present:g}; lower {names}")


def train_loop(settings: dict[str, Any]) -> None:
    """What every training worker runs: the data, the model, `Fit`, and a report to Ray at every checkpoint."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    config, root = configuration.from_json(settings["config"]), Path(settings["folder"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    data = TrainingData.open(config, Path(settings["dataset"]), root / "frames")
    torch.manual_seed(config.train.seed)
    state = _last_state()
    model = data.make_model(begun=state is not None)
    wrapped = _distributed(model) if world > 1 else model.to(device)
    fit = Fit(model, device=device, wrapped=wrapped, state=state)
    for progress in advance(fit, data, root, until=settings["until"]):
        _report(fit, data, progress.metrics, rank)
    if state is not None and fit.step >= settings["until"] and fit.step == state["step"]:
        # Every rank reports equally often: a run that was already finished says so once, with the checkpoint it has.
        _report(fit, data, {}, rank)


def advance(fit: Fit, data: TrainingData, root: Path, until: int) -> Iterator[Step]:
    """Train up to step `until`, with a row of the run's log at every logging step.

    Yields:
        The progress wherever a checkpoint is due, and at `until`.
    """
    if fit.rank == 0:
        repair_jsonl(root / LOG_NAME)
    if fit.step >= until:
        return
    validate = data.validator(fit.device) if fit.rank == 0 or fit.world == 1 else None
    with data.stream(fit.model, rank=fit.rank, world=fit.world, start_step=fit.step) as batches:
        for progress in fit.run(batches, validate):
            if fit.rank == 0:
                append_jsonl(root / LOG_NAME, [{"step": progress.step, **progress.metrics}])
            if progress.checkpoint_due or progress.step >= until:
                yield progress
            if progress.step >= until:
                return


def _distributed(model: Libra) -> nn.Module:
    """The model in DDP; pretrained models carry parameters (a pooler, a last norm) that take no part in our losses."""
    config = model.config
    unused = config.planner.backbone != "tiny" or config.refiner.encoder != "conv"
    wrapped: nn.Module = ray.train.torch.prepare_model(model, parallel_strategy_kwargs={"find_unused_parameters": unused})
    return wrapped


def _report(fit: Fit, data: TrainingData, metrics: dict[str, float], rank: int) -> None:
    row = {"step": fit.step, **metrics}
    if rank != 0:
        ray.train.report(row)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        checkpoint.save(folder, fit.model, fit.weights(), data.stats, data.facts, fit.step, fit.state())
        ray.train.report(row, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _last_state() -> dict[str, Any] | None:
    last = ray.train.get_checkpoint()
    if last is None:
        return None
    with last.as_directory() as folder:
        return checkpoint.load_trainer_state(folder)


def _fitted(trainer: TorchTrainer, folder: RunFolder, clock: Clock) -> ray.train.Result:
    """`fit`, with the workers' log rows shown as progress.

    Not in the main thread, where Ray Train would take Ctrl-C for itself and end the program as if it had succeeded.
    """
    outcome: Future[ray.train.Result] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001  (raised where the outcome is read)
            outcome.set_exception(error)

    threading.Thread(target=fit, name="train-fit", daemon=True).start()
    path, shown, ended = folder.path(LOG_NAME), 0, False
    with Progress("train", total=folder.config.train.steps, unit="step") as bar:
        while not ended:
            ended = bool(wait([outcome], timeout=0.5).done)
            rows = read_jsonl(path)
            if rows and rows[-1]["step"] != shown:
                shown = rows[-1]["step"]
                bar.to(shown, **{k: rows[-1][k] for k in SHOWN if k in rows[-1]})
            clock.tick()
    return outcome.result()
