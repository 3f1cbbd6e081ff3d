"""The chunk that the last level has to answer, cut out of a batch, and masked means over it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from libra_ray.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The last level's part of a batch: the H steps from its picture on.

    Attributes:
        actions: `(B, H, D)` normalised; `mask` `(B, H)` is False past the episode's end.
    """

    actions: Float[Tensor, "B H D"]
    mask: Bool[Tensor, "B H"]

    @property
    def data(self) -> Float[Tensor, "B H D"]:
        """The actions with zeros past the episode's end, which would reach the others through attention."""
        return self.actions.masked_fill(~self.mask[..., None], 0)


def chunk_of(batch: Batch, horizon: int) -> Chunk:
    """The chunk of every window."""
    steps = batch.offset[:, None] + torch.arange(horizon, device=batch.offset.device)
    actions = batch.actions.gather(1, steps[..., None].expand(-1, -1, batch.actions.shape[-1]))
    return Chunk(actions=actions, mask=batch.action_mask.gather(1, steps))


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The mean over unmasked entries; 0 where all are masked."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def mean_error(errors: Float[Tensor, "B H D"], mask: Bool[Tensor, "B H"]) -> float:
    """The mean over dimensions and unmasked steps."""
    return float(masked_mean(errors.mean(-1), mask))
