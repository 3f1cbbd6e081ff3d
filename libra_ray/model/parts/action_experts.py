"""Action experts that read one backbone's features, the router between them, and what the router learns from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from libra_ray.config import Config
from libra_ray.model.parts.action_tokens import ActionTokenizer
from libra_ray.model.parts.backbone import BackboneOutput
from libra_ray.model.parts.chunks import Chunk, masked_mean
from libra_ray.model.parts.planner import FeatureWidths, Planner, plan_loss
from libra_ray.model.parts.refiner import Refiner, RefinerContext
from libra_ray.model.precision import matched
from libra_ray.types import RobotShape


@dataclass(frozen=True, kw_only=True)
class ExpertReading:
    """What an expert makes of the features before it answers: `hidden` `(B, H, d)`, and of denoisers the `context`."""

    hidden: Float[Tensor, "B H d"]
    context: RefinerContext | None = None


class ActionExpert(nn.Module, ABC):
    """One way to say a chunk of actions, with a head of its own over features that it is handed."""

    head: Planner

    def read(self, features: BackboneOutput, state: Float[Tensor, "B S"]) -> ExpertReading:
        """The part of an answer that its loss needs too."""
        return ExpertReading(hidden=self.head.attend(features, state).hidden)

    @abstractmethod
    def loss(self, reading: ExpertReading, chunk: Chunk, generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """Its own loss on the chunk's unmasked steps."""

    @abstractmethod
    def actions(
        self, reading: ExpertReading, noise: Float[Tensor, "B H D"], committed: Float[Tensor, "B K D"] | None = None
    ) -> Float[Tensor, "B H D"]:
        """Normalised actions in [-1, 1]; `committed` as in `SystemInput`."""


class TokenExpert(ActionExpert):
    """A class per step and dimension in one parallel pass, learned by cross-entropy; the cells' centres are executed."""

    def __init__(self, config: Config, shape: RobotShape, features: FeatureWidths) -> None:
        super().__init__()
        self.tokenizer = ActionTokenizer(count=config.action.bins)
        self.head = _head(config, shape, features, config.action.bins)

    def loss(self, reading: ExpertReading, chunk: Chunk, generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """Cross-entropy, in nats."""
        return plan_loss(self.head.logits(reading.hidden), self.tokenizer.encode(chunk.actions), chunk.mask)

    def actions(
        self, reading: ExpertReading, noise: Float[Tensor, "B H D"], committed: Float[Tensor, "B K D"] | None = None
    ) -> Float[Tensor, "B H D"]:
        """The centres of the most likely classes; neither noise nor committed actions are read."""
        return self.tokenizer.decode(self.head.logits(reading.hidden).argmax(-1)).to(noise)


class DenoisingExpert(ActionExpert):
    """Denoises a chunk under its head's hidden states and the backbone's pictures, by one of the two objectives."""

    def __init__(self, config: Config, shape: RobotShape, features: FeatureWidths, pictures: int, objective: str) -> None:
        super().__init__()
        self.head = _head(config, shape, features, 0)
        self.refiner = Refiner(
            replace(config.refiner, objective="ddpm" if objective == "diffusion" else "flow", vision="shared"),
            image_size=config.data.image_size,
            pictures=pictures,
            horizon=config.action.horizon,
            dims=shape.action_dim,
            state=shape.state_dim,
            feature_width=features.width,
            hidden_width=config.planner.width,
        )

    def read(self, features: BackboneOutput, state: Float[Tensor, "B S"]) -> ExpertReading:
        """The head's hidden states, and what modulates the denoising."""
        language = features.sentence if self.refiner.config.see_language else None
        context = self.refiner.encode_context(None, state, features.pictures, language)
        return replace(super().read(features, state), context=context)

    def loss(self, reading: ExpertReading, chunk: Chunk, generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """The denoising loss."""
        assert reading.context is not None
        return self.refiner.loss(chunk, reading.hidden, reading.context, self._origin, generator)

    def actions(
        self, reading: ExpertReading, noise: Float[Tensor, "B H D"], committed: Float[Tensor, "B K D"] | None = None
    ) -> Float[Tensor, "B H D"]:
        """Denoised from `noise`."""
        assert reading.context is not None
        return self.refiner.sample(reading.hidden, reading.context, self._origin, noise, committed)

    def _origin(self, hidden: Float[Tensor, "B H d"]) -> Float[Tensor, "B H D"]:
        """Answers are counted from 0: there is no coarse action."""
        return hidden.new_zeros(*hidden.shape[:2], self.refiner.to_action.out_features)


def make_expert(name: str, config: Config, shape: RobotShape, features: FeatureWidths, pictures: int) -> ActionExpert:
    """The expert of that name: `token`, `diffusion` or `flow`."""
    if name == "token":
        return TokenExpert(config, shape, features)
    return DenoisingExpert(config, shape, features, pictures, name)


class Router(nn.Module):
    """From the features' summary, and proprioception where the heads read it, to a logit for every expert.

    It learns by its own loss alone, and that teaches the features nothing.
    """

    STAYS_FP32 = ("from_state", "to_logits")

    def __init__(self, config: Config, shape: RobotShape, features: FeatureWidths, experts: int) -> None:
        super().__init__()
        width = config.planner.width
        self.from_summary = nn.Linear(features.summary_width, width)
        self.from_state = nn.Linear(shape.state_dim, width) if config.planner.see_state else None
        self.to_logits = nn.Sequential(nn.GELU(), nn.Linear(width, experts))

    def forward(self, features: BackboneOutput, state: Float[Tensor, "B S"]) -> Float[Tensor, "B K"]:
        """The logits; their softmax are the weights."""
        read = self.from_summary(features.summary.detach())
        read = read if self.from_state is None else read + self.from_state(state)
        logits: Tensor = self.to_logits(matched(read, cast("nn.Linear", self.to_logits[-1]).weight))
        return logits.float()


def shares_of(logits: Float[Tensor, "B K"], routing: str) -> Float[Tensor, "B K"]:
    """How much of each answer is which expert's: all of one by `hard` routing, its weight by `soft`."""
    return functional.one_hot(logits.argmax(-1), logits.shape[-1]).float() if routing == "hard" else logits.softmax(-1)


def errors_of(answers: Float[Tensor, "K B H D"], chunk: Chunk) -> Float[Tensor, "B K"]:
    """Of every answer the mean squared error of its unmasked steps: what all experts share, whatever their losses."""
    squared = (answers - chunk.actions).square().mean(-1) * chunk.mask
    return (squared.sum(-1) / chunk.mask.sum(-1).clamp(min=1)).T


def choice_loss(
    logits: Float[Tensor, "B K"], errors: Float[Tensor, "B K"], chunk: Chunk, temperature: float
) -> Float[Tensor, ""]:
    """Cross-entropy of the weights to the experts' responsibilities for a window.

    These are the softmax of -errors / temperature, with errors relative to the mean over windows and experts. So a gate is
    fitted in a mixture of experts (Jordan & Jacobs, Hierarchical Mixtures of Experts and the EM Algorithm). The expected error
    of the chosen expert would have no gradient left once the router is sure, which it is before the experts are any good.
    """
    known = chunk.mask.any(-1)
    relative = errors / masked_mean(errors.mean(-1), known).clamp(min=1e-12)
    losses = -((-relative / temperature).softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return masked_mean(losses, known)


def load_loss(logits: Float[Tensor, "B K"], shares: Float[Tensor, "B K"], chunk: Chunk) -> Float[Tensor, ""]:
    """K times the sum over experts of their share of the windows times their mean weight (Fedus et al., Switch Transformers).

    It is 1 where all are used alike, and K where one has all. The shares have no gradient.
    """
    known = chunk.mask.any(-1, keepdim=True)
    count = known.sum().clamp(min=1)
    share, weight = (shares.detach() * known).sum(0) / count, (logits.softmax(-1) * known).sum(0) / count
    return logits.shape[-1] * (share * weight).sum()


def _head(config: Config, shape: RobotShape, features: FeatureWidths, bins: int) -> Planner:
    horizon, dims = config.action.horizon, shape.action_dim
    return Planner(config.planner, features, plan_steps=horizon, dims=dims, bins=bins, state=shape.state_dim)
