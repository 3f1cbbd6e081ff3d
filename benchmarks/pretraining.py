"""One backbone for all cells of a study, so that they differ in what is compared and not in who understood the words first.

A random backbone takes most of a small cell's time to learn which words mean which block, and when it does depends on the seed
and on N. A published planner begins with a pretrained backbone, too. This one has learned from the study's own demonstrations,
in a planner of the finest N: from its tokens all coarser ones follow.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from libra_ray.config import Config, override
from libra_ray.data.dataset import open_dataset
from libra_ray.data.frames import frame_cache
from libra_ray.on_ray import stages
from libra_ray.on_ray.train import train
from libra_ray.runs.folder import RunFolder

PART = "planner.backbone"
BACKBONES: Mapping[str, str] = {
    "libra": PART,
    "monolithic": PART,
    "regression": PART,
    "coarse_to_fine": PART,
    "anchor_refine": f"anchor.{PART}={PART}",
    "experts": f"shared.backbone={PART}",
    # The tactical level finds things in pictures as the backbone does, and nothing else has taught it to.
    "hierarchy": f"strategic.backbone={PART},tactical.guided.eyes={PART}.eyes,tactical.guided.gaze={PART}.gaze",
}
"""System -> `train.start_parts` that give it the backbone."""
PLACE = "train.start_from"
"""Where on this machine the backbone lies: no setting that results depend on."""
WORDED_TASKS: Mapping[str, Any] = {
    "sim.tasks": "touch,push",
    "sim.max_steps": 60,
    "record.episodes_per_task": 1500,
    "record.noise_std": 0.5,
    "train.start_parts": PART,
    "train.steps": 600,
    "evaluate.episodes_per_task": 60,
}
"""What both studies share: tasks that only the words tell apart, 120 evaluation episodes a cell."""
PRETRAINING: Mapping[str, Any] = {
    PLACE: "",
    "train.start_parts": "planner,refiner",
    "train.curriculum": "threshold",
    "train.steps": 2000,
    "train.checkpoint_every": 400,
    "train.validate_every": 400,
    "train.lambda_diff": 0.1,
    "action.bins": 100,
    "model.system": "libra",
    "refiner.vision": "shared",
    "refiner.depth": 1,
    "refiner.noise_draws": 1,
}
"""Changes of a cell's configuration; the refiner is there because there must be one."""
QUICK: Mapping[str, Any] = {"train.steps": 4, "train.checkpoint_every": 2, "train.validate_every": 2}


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint that `pretrain` leaves in a folder."""
    return folder / "checkpoint"


def begins_with(folder: Path, system: str) -> dict[str, str]:
    """The settings by which a system begins with the backbone that `pretrain` leaves in a folder."""
    return {PLACE: str(checkpoint_of(folder)), "train.start_parts": BACKBONES[system]}


def pretrain(folder: Path, data: RunFolder, changes: Mapping[str, Any], *, quick: bool) -> None:
    """Record the demonstrations and train the backbone, or go on with either.

    Args:
        folder: for the training's run.
        data: the recording's run, of a cell's configuration; it need not exist yet.
        changes: what a bench's backbone is trained with beside `PRETRAINING`.
        quick: a few steps that teach nothing.
    """
    recorded = RunFolder.open(data.root, data.config)
    stages.record(recorded)
    frame_cache(open_dataset(recorded.dataset, data.config.data), recorded.path("frames"), data.config.data.image_size)
    run = RunFolder.open(folder, pretraining(data.config, recorded.dataset, changes, quick=quick))
    run.share_frames(recorded.path("frames"))
    if not run.done("train"):
        with run.stage("train") as clock:
            train(run, clock)


def pretraining(config: Config, dataset: Path, changes: Mapping[str, Any], *, quick: bool) -> Config:
    """The configuration of the backbone's own training."""
    return override(config, {**PRETRAINING, **changes, **(QUICK if quick else {}), "data.root": str(dataset)})
