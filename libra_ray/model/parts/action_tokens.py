"""Coarse action tokens: uniform bins per action dimension, decoded at cell centres (method.md, Libra-VLA)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ActionTokenizer:
    """N uniform cells over [-1, 1], the same for every action dimension.

    The tokens belong to the model: they are computed from normalised actions inside the loss, so changing N needs no new data.
    The round trip `decode(encode(a))` is within half a cell, 1 / N, of any `a` in [-1, 1].
    """

    count: int

    def __post_init__(self) -> None:
        """Refuse fewer than two cells."""
        if self.count < 2:
            raise ValueError(f"bins={self.count}; at least 2 are needed")

    @property
    def mask_token(self) -> int:
        """The extra token id for "no intent known here" (dropped condition, or a step the plan no longer covers)."""
        return self.count

    def encode(self, actions: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Normalised actions in [-1, 1] to token ids in [0, N); values outside fall into the outermost cells."""
        return ((actions + 1) / 2 * self.count).floor().long().clamp(0, self.count - 1)

    def decode(self, tokens: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Token ids to cell centres in (-1, 1); the mask token becomes 0."""
        centres = (tokens.to(torch.get_default_dtype()) + 0.5) / self.count * 2 - 1
        return torch.where(tokens == self.mask_token, torch.zeros_like(centres), centres)
