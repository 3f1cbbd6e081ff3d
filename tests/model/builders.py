"""Tiny models, batches and checkpoints: width 32, one layer, pictures of 32 pixels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from libra_ray import checkpoint, shards
from libra_ray.batch import Batch
from libra_ray.checkpoint import DatasetSpec, Manifest
from libra_ray.config import Config, override, preset
from libra_ray.data.transforms import NormStats, VectorStats
from libra_ray.model.registry import make_system
from libra_ray.model.system import System
from libra_ray.types import IMAGE_KEY, Observation, RobotShape

SHAPE = RobotShape(action_dim=4, state_dim=5, cameras=1)
INSTRUCTIONS = ("open the drawer", "press the button down")
KEYS = (IMAGE_KEY, "observation.images.wrist")


def tiny_config(changes: Mapping[str, Any] | None = None) -> Config:
    """The debug preset without its simulator's settings, changed by `changes`."""
    tiny = {
        "train.steps": 4,
        "train.batch_size": 8,
        "train.warmup_steps": 1,
        "train.log_every": 1,
        "train.checkpoint_every": 100,
    }
    return override(preset("debug"), {**tiny, "train.validate_every": 0, **(changes or {})})


def tiny_model(changes: Mapping[str, Any] | None = None, shape: RobotShape = SHAPE) -> System:
    """An untrained model, drawn by `train.seed`, its zero-initialised gates and answer opened so that every input matters."""
    config = tiny_config(changes)
    torch.manual_seed(config.train.seed)
    return open_gates(make_system(config, shape)).eval()


def open_gates(model: System) -> System:
    """Give the zeros small values, as a few steps of training would."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith(("to_modulation.weight", "to_action.weight", "to_residual.weight")):
            weight.data.normal_(0, 0.1, generator=generator)
    return model


def make_batch(model: System, size: int = 6, seed: int = 0, *, masked: int = 0) -> Batch:
    """Random windows for `model`; window `b` has `masked * (b % 2)` steps past the episode's end."""
    generator = torch.Generator().manual_seed(seed)
    config, shape = model.config, model.shape
    pictures = (size, shape.cameras * config.data.history, 3, config.data.image_size, config.data.image_size)
    steps = config.action.plan_steps + config.action.horizon
    text = model.tokenise([INSTRUCTIONS[b % 2] for b in range(size)])
    return Batch(
        plan_images=torch.randint(0, 256, pictures, generator=generator, dtype=torch.uint8),
        plan_state=torch.randn(size, shape.state_dim, generator=generator),
        images=torch.randint(0, 256, pictures, generator=generator, dtype=torch.uint8),
        state=torch.randn(size, shape.state_dim, generator=generator),
        text=text.ids,
        text_mask=text.mask,
        actions=torch.rand(size, steps, shape.action_dim, generator=generator) * 2 - 1,
        action_mask=torch.arange(steps) < (steps - masked * (torch.arange(size) % 2))[:, None],
        offset=torch.arange(size) % (config.action.chunks) * config.action.horizon,
        path=torch.randn(size, config.action.plan_steps, shape.state_dim, generator=generator),
        **{
            name: torch.randint(0, len(shape.subgoals) + 1, (size, config.hierarchy.subgoals), generator=generator)
            for name in ("subgoals", "heard_subgoals")
        },
    )


def make_stats(shape: RobotShape = SHAPE) -> NormStats:
    """Actions in [-2, 4], so that normalised and raw ones cannot be mistaken for each other; states in [-1, 1]."""

    def vector(dims: int, low: float, high: float) -> VectorStats:
        ends = {"low": low, "high": high, "q01": low, "q99": high, "mean": (low + high) / 2, "std": 1.0}
        return VectorStats(**{name: np.full(dims, value, np.float32) for name, value in ends.items()})

    return NormStats(state=vector(shape.state_dim, -1, 1), action=vector(shape.action_dim, -2, 4))


def save_checkpoint(folder: Path, model: System, step: int = 0, trainer: dict[str, Any] | None = None) -> Manifest:
    """A checkpoint of `model` to run, and to resume from where a trainer's state is given."""
    spec = DatasetSpec(shape=model.shape, image_keys=KEYS[: model.shape.cameras], control_hz=10, instructions=INSTRUCTIONS)
    manifest = checkpoint.save(folder, model, model.state_dict(), make_stats(model.shape), spec, step)
    if trainer is not None:
        shards.begin(folder / checkpoint.TRAINER_FOLDER, trainer).finish(first=True)
    return manifest


def make_observation(robot: int = 0, step: int = 0, *, size: int = 32, past: int = 0, cameras: int = 1) -> Observation:
    """What robot number `robot` sees at `step`; no two of them are alike."""
    rng = np.random.default_rng([robot, step])

    def pictures() -> dict[str, np.ndarray]:
        return {key: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for key in KEYS[:cameras]}

    return Observation(
        images=pictures(),
        state=rng.uniform(-1, 1, SHAPE.state_dim).astype(np.float32),
        instruction=INSTRUCTIONS[robot % 2],
        step=step,
        past=[pictures() for _ in range(past)],
    )
