"""Checkpoints of Meta-World's robot that no training has made."""

from pathlib import Path

from libra_ray import checkpoint
from libra_ray.types import IMAGE_KEY, RobotShape
from tests.model.builders import make_stats, tiny_model

METAWORLD_HZ = 80


def trained(root: Path, shape: RobotShape | None = None, control_hz: float = METAWORLD_HZ, **changes: object) -> Path:
    """A checkpoint of a robot with Meta-World's camera."""
    shape = shape or RobotShape(action_dim=4, state_dim=4, cameras=1)
    model = tiny_model({name.replace("__", "."): value for name, value in changes.items()}, shape)
    spec = checkpoint.DatasetSpec(shape=shape, image_keys=(IMAGE_KEY,), control_hz=control_hz, instructions=("go",))
    checkpoint.save(root, model, model.state_dict(), make_stats(shape), spec, step=4)
    return root
