"""How hard each system's problem is, and how much of it was learned: measured on held-out episodes.

The published curve of success over N has no such measure. Here the planner's cross-entropy stands beside the entropy of what it
has to say, and the refiner's error beside the variance that the tokens leave to it.
"""

import math
from dataclasses import asdict, dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from libra_ray.batch import Batch
from libra_ray.model.libra import Chunk, Libra, chunk_of
from libra_ray.model.parts.action_tokens import Bins
from libra_ray.model.parts.backbone import Text
from libra_ray.model.parts.planner import masked_mean

PREFIX = "val_"
"""Of the measures' names in a training log."""


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """Offline measures of one model on held-out episodes; what a monolithic model has not is None.

    Attributes:
        loss_plan: the planner's cross-entropy, nats per token.
        plan_accuracy: share of the tokens that its most likely class hits.
        token_entropy: empirical entropy of the tokens, nats per token: of each step and dimension by itself, on average.
        token_entropy_task: the same within each instruction, weighted by how often it occurs.
        plan_resolved: share of `token_entropy_task` that the planner's cross-entropy is below it; negative where it is above.
        residual_share: share of the variance of the normalised actions that lies within bins, which the tokens leave.
        explained_truth: share of that residual variance which the refiner explains when it reads ground-truth tokens,
            1 - MSE / residual variance. 1 is perfect, 0 no better than each bin's mean, negative worse.
        explained_planner: the same when it reads the planner's most likely tokens.
        loss_diff: the refiner's denoising loss, reading ground-truth tokens.
        action_error: mean absolute error of the refined chunk, in normalised units, reading the planner's tokens.
        coarse_error: the same of the bins' centres without a refiner.
    """

    loss_diff: float
    action_error: float
    loss_plan: float | None = None
    plan_accuracy: float | None = None
    token_entropy: float | None = None
    token_entropy_task: float | None = None
    plan_resolved: float | None = None
    residual_share: float | None = None
    explained_truth: float | None = None
    explained_planner: float | None = None
    coarse_error: float | None = None

    def row(self) -> dict[str, float]:
        """The known measures under their names in a training log."""
        return {PREFIX + name: value for name, value in asdict(self).items() if value is not None}


@torch.no_grad()
def measure_difficulty(model: Libra, batch: Batch, everything: Batch) -> Difficulty:
    """The measures of `model`.

    Args:
        model: in evaluation mode.
        batch: held-out windows with pictures; what the networks are asked about.
        everything: all held-out windows, with or without pictures; what the tokens' statistics are taken from.
    """
    text, chunk = Text(ids=batch.text, mask=batch.text_mask), chunk_of(batch, model.config.action.horizon)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = model(batch, "truth")
        planned = model.plan(batch.plan_images, batch.plan_state, text)
        noise = model.config.refiner.sample_noise * torch.randn_like(chunk.actions)
    chosen = chunk.pick(planned)
    refined = model.refine(batch.images, batch.state, text, chosen, noise)
    common = {"loss_diff": float(losses.diff), "action_error": _mean_error((refined - chunk.actions).abs(), chunk)}
    if losses.plan is None or losses.accuracy is None:
        return Difficulty(**common)
    means = BinMeans.of(model.bins, everything.actions, everything.action_mask)
    truth = model.bins.encode(chunk.actions).masked_fill(~chunk.mask[..., None], model.bins.hidden)
    from_truth = model.refine(batch.images, batch.state, text, truth, noise)
    tokens = model.bins.encode(everything.actions)
    by_task = token_entropy(tokens, everything.action_mask, model.bins.count, groups_of(everything))
    return Difficulty(
        **common,
        loss_plan=float(losses.plan),
        plan_accuracy=float(losses.accuracy),
        token_entropy=token_entropy(tokens, everything.action_mask, model.bins.count),
        token_entropy_task=by_task,
        plan_resolved=1 - float(losses.plan) / by_task if by_task > 0 else None,
        residual_share=means.residual_share(everything.actions, everything.action_mask),
        explained_truth=means.explained(from_truth, chunk),
        explained_planner=means.explained(refined, chunk),
        coarse_error=_mean_error((model.bins.decode(chosen) - chunk.actions).abs(), chunk),
    )


def _mean_error(errors: Float[Tensor, "B H D"], chunk: Chunk) -> float:
    return float(masked_mean(errors.mean(-1), chunk.mask))


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

    bins: Bins
    means: Float[Tensor, "D N"]

    @classmethod
    def of(cls, bins: Bins, actions: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Self:
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
