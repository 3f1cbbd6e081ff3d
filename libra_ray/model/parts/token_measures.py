"""How hard the problems are that coarse tokens pose, and how much of each was learned: measured on held-out episodes.

The published curve of success over N has no such measure. Here the planner's cross-entropy stands beside the entropy of the
tokens it has to predict, and the refiner's error beside the variance that the tokens leave to it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from libra_ray.batch import Batch
from libra_ray.model.parts.action_tokens import ActionTokenizer
from libra_ray.model.parts.chunks import Chunk, masked_mean, mean_error


def measure_tokens(
    bins: ActionTokenizer,
    chunk: Chunk,
    planned: Int[Tensor, "B H D"],
    refine: Callable[[Int[Tensor, "B H D"]], Float[Tensor, "B H D"]],
    everything: Batch,
    loss_plan: float,
) -> dict[str, float]:
    """How hard each problem is, and how much of it was learned.

    Args:
        chunk: held-out chunks.
        planned: the tokens that the planner thinks most likely for them.
        refine: the refiner's actions for given tokens.
        everything: all held-out windows, which the tokens' statistics are taken from.
        loss_plan: the planner's cross-entropy, nats per token.

    Returns:
        `token_entropy`: empirical entropy of the tokens, nats per token: of each step and dimension by itself, on average.
        `token_entropy_task`: the same within each instruction, weighted by how often it occurs.
        `plan_resolved`: share of that which the planner's cross-entropy is below it; negative where it is above.
        `variance_explained`: share of all variance that the refiner explains when it reads ground-truth tokens.
        `residual_share`: share of the variance of the normalised actions that lies within bins, which the tokens leave.
        `explained_truth`: share of that residual variance which the refiner explains when it reads ground-truth tokens,
        1 - MSE / residual variance. 1 is perfect, 0 no better than each bin's mean, negative worse.
        `explained_planner`: the same when it reads the planner's most likely tokens.
        `action_error`: mean absolute error of the refined chunk, in normalised units, reading the planner's tokens.
        `coarse_error`: the same of the bins' centres without a refiner.
    """
    means = BinMeans.of(bins, everything.actions, everything.action_mask)
    truth = bins.encode(chunk.actions).masked_fill(~chunk.mask[..., None], bins.mask_token)
    tokens, refined = bins.encode(everything.actions), refine(planned)
    by_task = token_entropy(tokens, everything.action_mask, bins.count, groups_of(everything))
    residual = means.residual_share(everything.actions, everything.action_mask)
    explained = means.explained(refine(truth), chunk)
    found = {
        "token_entropy": token_entropy(tokens, everything.action_mask, bins.count),
        "token_entropy_task": by_task,
        "residual_share": residual,
        "explained_truth": explained,
        "variance_explained": 1 - residual * (1 - explained),
        "explained_planner": means.explained(refined, chunk),
        "action_error": mean_error((refined - chunk.actions).abs(), chunk.mask),
        "coarse_error": mean_error((bins.decode(planned) - chunk.actions).abs(), chunk.mask),
    }
    return found | ({"plan_resolved": 1 - loss_plan / by_task} if by_task > 0 else {})


def groups_of(batch: Batch) -> Int[Tensor, " B"]:
    """A number for every different instruction in the batch."""
    return torch.unique(batch.text, dim=0, return_inverse=True)[1]


def token_entropy(
    tokens: Int[Tensor, "B L D"], mask: Bool[Tensor, "B L"], bins: int, groups: Int[Tensor, " B"] | None = None
) -> float:
    """Empirical entropy of tokens, nats per token: of each step and dimension by itself, averaged over all unmasked tokens.

    With the Miller-Madow correction, (occupied classes - 1) / 2n, because few windows look more regular than they are; never
    above log N.

    Args:
        tokens: class ids in [0, N).
        mask: False on steps that do not count.
        bins: N.
        groups: a number per window, from 0; the entropy is then taken within each group and weighted by its tokens.
    """
    batch, steps, dims = tokens.shape
    groups = torch.zeros(batch, dtype=torch.long, device=tokens.device) if groups is None else groups
    cells = int(groups.max()) + 1
    place = torch.arange(steps, device=tokens.device)[:, None] * dims + torch.arange(dims, device=tokens.device)
    flat = ((groups[:, None, None] * (steps * dims) + place) * bins + tokens)[mask]
    counts = torch.bincount(flat.flatten(), minlength=cells * steps * dims * bins).view(-1, bins).double()
    number = counts.sum(dim=-1)
    shares = counts / number.clamp(min=1)[:, None]
    plain = -torch.special.xlogy(shares, shares).sum(dim=-1)
    corrected = plain + ((counts > 0).sum(dim=-1) - 1).clamp(min=0) / (2 * number.clamp(min=1))
    return float((corrected.clamp(max=math.log(bins)) * number).sum() / number.sum().clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class BinMeans:
    """What the tokens alone say of an action at best: the mean of each bin and dimension, `(D, N)`."""

    bins: ActionTokenizer
    means: Float[Tensor, "D N"]

    @classmethod
    def of(cls, bins: ActionTokenizer, actions: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> "BinMeans":
        """The means of unmasked actions; the centre of a bin that none of them falls into."""
        values, dims = actions[mask], actions.shape[-1]
        place = bins.encode(values) + torch.arange(dims, device=values.device) * bins.count
        counts = torch.bincount(place.flatten(), minlength=dims * bins.count).view(dims, -1)
        sums = torch.bincount(place.flatten(), weights=values.flatten().double(), minlength=dims * bins.count).view(dims, -1)
        centres = bins.decode(torch.arange(bins.count, device=values.device)).double().expand_as(sums)
        return cls(bins=bins, means=torch.where(counts > 0, sums / counts.clamp(min=1), centres).float())

    def decode(self, actions: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The mean of the bin that each action falls into."""
        dims = torch.arange(actions.shape[-1], device=actions.device)
        return self.means[dims.expand(actions.shape), self.bins.encode(actions)]

    def residual_share(self, actions: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> float:
        """Variance within bins over all variance of the unmasked actions, both summed over dimensions; in [0, 1]."""
        values = actions[mask]
        total = values.var(dim=0, correction=0).sum()
        return float((values - self.decode(values)).square().mean(dim=0).sum() / total.clamp(min=1e-12))

    def explained(self, refined: Float[Tensor, "B H D"], chunk: Chunk) -> float:
        """1 - MSE of `refined` / MSE of the bins' means, on the unmasked steps of a chunk."""
        left = masked_mean((chunk.actions - self.decode(chunk.actions)).square().mean(-1), chunk.mask)
        mistakes = masked_mean((chunk.actions - refined).square().mean(-1), chunk.mask)
        return float(1 - mistakes / left.clamp(min=1e-12))
