"""The chunk that the last level has to answer, cut out of a batch, and masked means over it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from libra_ray.batch import Batch
from libra_ray.model.parts.draws import integers


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


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The beginning of a chunk that is decided already (real-time chunking).

    Attributes:
        actions: `(B, H, D)` normalised; of no meaning where `mask` `(B, H)` is False.
    """

    actions: Float[Tensor, "B H D"]
    mask: Bool[Tensor, "B H"]

    @classmethod
    def of(cls, committed: Float[Tensor, "B K D"], horizon: int, most: int) -> "Prefix":
        """From the actions that robots are committed to, NaN where they are not; at most `most` of their first steps."""
        actions = committed.new_zeros(len(committed), horizon, committed.shape[-1])
        mask = torch.zeros(actions.shape[:2], dtype=torch.bool, device=committed.device)
        steps = min(committed.shape[1], most)
        mask[:, :steps] = ~committed[:, :steps].isnan().any(-1)
        actions[:, :steps] = committed[:, :steps].nan_to_num()
        return cls(actions=actions, mask=mask)

    @classmethod
    def drawn(cls, chunk: Chunk, most: int, generator: torch.Generator | None = None) -> "Prefix":
        """The chunk's own first steps, for each window a number drawn from 0 to `most`."""
        steps = integers(most + 1, (len(chunk.actions), 1), chunk.mask, generator)
        mask = (torch.arange(chunk.mask.shape[1], device=chunk.mask.device) < steps) & chunk.mask
        return cls(actions=chunk.data, mask=mask)

    def into(self, actions: Float[Tensor, "B H D"]) -> Float[Tensor, "B H D"]:
        """The actions, with those that are decided in their places."""
        return torch.where(self.mask[..., None], self.actions.to(actions), actions)


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The mean over unmasked entries; 0 where all are masked."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def mean_error(errors: Float[Tensor, "B H D"], mask: Bool[Tensor, "B H"]) -> float:
    """The mean over dimensions and unmasked steps."""
    return float(masked_mean(errors.mean(-1), mask))
