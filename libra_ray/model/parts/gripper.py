"""The gripper as a decision: a probability, its threshold, and how far a wrong decision has to be moved (AnchorRefine)."""

import torch
from jaxtyping import Float
from torch import Tensor

from libra_ray.spec import NO_GRIPPER

THRESHOLD = 0.5
"""The probability above which the gripper is commanded to the upper end of its range."""


def gripper_dim(setting: str, dims: int, declared: int | None = None) -> int | None:
    """The gripper's action dimension; None where there is none.

    Args:
        setting: `declared`, `last`, `none`, or a number from 0.
        dims: of the action.
        declared: by the data set: the dimension, `NO_GRIPPER` for none, or None for nothing, which means the last.

    Raises:
        ValueError: the action has no such dimension, or no other one.
    """
    if setting == "none" or (setting == "declared" and declared == NO_GRIPPER):
        return None
    last = dims - 1
    found = (last if declared is None else declared) if setting == "declared" else last if setting == "last" else int(setting)
    if found >= dims or dims < 2:
        raise ValueError(
            f"anchor_refine.gripper={setting}: the data's actions have {dims} dimension{'s' if dims > 1 else ''}; give last, "
            "none or a number below that, and none where there is but one"
        )
    return found


def probability(action: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Of a normalised gripper action in [-1, 1]; of a mean of both ends it is the share of the upper one."""
    return ((action + 1) / 2).clamp(0, 1)


def decided(q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The normalised action, -1 or 1."""
    return torch.where(q > THRESHOLD, 1.0, -1.0)


def decision_target(q: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"], margin: float) -> Float[Tensor, "*shape"]:
    """What, added to the probability, carries it just across the threshold where it decides wrongly; 0 where it is right.

    On the threshold nothing is decided, and so nothing is right: there the target leads off it either way. Else a decision
    against the upper end would hang on the sign of the smallest error.

    Args:
        q: the probability; 0.5 where there is none.
        wanted: the normalised action that it should decide for.
        margin: how far across.
    """
    right, said = decided(probability(wanted)), (q - THRESHOLD).sign()
    return (right - said).sign() * ((q - THRESHOLD).abs() + margin)
