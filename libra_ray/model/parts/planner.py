"""The Semantic Planner (System 2): pictures and instruction to coarse action tokens in one parallel pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from libra_ray.config import PlannerConfig
from libra_ray.model.parts.attention import ModulatedBlock
from libra_ray.model.parts.backbone import Backbone, BackboneOutput, Text, WithBackbone
from libra_ray.model.parts.chunks import masked_mean
from libra_ray.model.precision import matched


@dataclass(frozen=True, kw_only=True)
class PlannerOutput:
    """`hidden` `(B, L, width)`, the head's states at its L queries, and the backbone's features behind them."""

    hidden: Float[Tensor, "B L d"]
    features: BackboneOutput


@dataclass(frozen=True, kw_only=True)
class FeatureWidths:
    """The widths of features that a head is handed, instead of a backbone of its own."""

    width: int
    summary_width: int


class Planner(WithBackbone):
    """A vision-language backbone joined by L learned queries in a bidirectional head (method.md, Libra-VLA).

    One parallel pass; no autoregression and no reuse of the text vocabulary. The head attends to the backbone's tokens and is
    modulated by their summary and by proprioception (adaLN-Zero, as in the refiner): how far the hand is from what was named is
    a function of both at once.
    """

    STAYS_FP32 = ("from_state", "steer_by_state", "to_logits")

    def __init__(
        self, config: PlannerConfig, backbone: Backbone | FeatureWidths, *, plan_steps: int, dims: int, bins: int, state: int
    ) -> None:
        """With `bins=0` there are no classes, only hidden states (the monolithic baseline).

        Where another's features are read, by `attend` alone, `backbone` is their widths.
        """
        super().__init__(backbone, config)
        self.plan_steps, self.dims, self.bins = plan_steps, dims, bins
        width = config.width
        self.from_backbone = nn.Linear(backbone.width, width)
        self.from_state = nn.Linear(state, width) if config.see_state else None
        self.queries = nn.Parameter(torch.randn(plan_steps, width) * 0.02)
        self.from_summary = nn.Linear(backbone.summary_width, 2 * width)
        self.steer_by_state = nn.Linear(state, 2 * width) if config.see_state else None
        self.mix = nn.Sequential(nn.GELU(), nn.Linear(2 * width, width), nn.SiLU())
        self.blocks = nn.ModuleList(ModulatedBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, dims * bins) if bins else None

    def forward(
        self, images: UInt8[Tensor, "B T C height width"], state: Float[Tensor, "B S"], text: Text
    ) -> Float[Tensor, "B L D N"]:
        """Logits over the bins of every dimension of the L steps that follow the pictures."""
        return self.logits(self.hidden_states(images, state, text).hidden)

    def logits(self, hidden: Float[Tensor, "B L d"]) -> Float[Tensor, "B L D N"]:
        """The logits of hidden states."""
        assert self.to_logits is not None, "a planner without classes has no logits"
        said = cast("Tensor", self.to_logits(matched(hidden, self.to_logits.weight)))
        return said.view(len(hidden), self.plan_steps, self.dims, self.bins)

    def hidden_states(
        self, images: UInt8[Tensor, "B T C height width"], state: Float[Tensor, "B S"], text: Text
    ) -> PlannerOutput:
        """The hidden states behind the logits, one per step."""
        return self.attend(self.encode(images, text), state)

    def attend(
        self, features: BackboneOutput, state: Float[Tensor, "B S"], beside: Float[Tensor, "B L d"] | None = None
    ) -> PlannerOutput:
        """The hidden states from a backbone's features; `beside` is added to the queries."""
        context, mask = self.from_backbone(features.tokens), features.mask
        parts = [context] if self.from_state is None else [context, matched(self.from_state(state)[:, None], self.queries)]
        queries = self.queries.expand(len(context), -1, -1)
        x = torch.cat([*parts, queries if beside is None else matched(queries + beside, self.queries)], dim=1)
        allowed = None if mask is None else functional.pad(mask, (0, x.shape[1] - mask.shape[1]), value=True)
        condition = self._condition(features, state)
        for block in self.blocks:
            x = block(x, condition, allowed)
        return PlannerOutput(hidden=self.norm(x[:, -self.plan_steps :]), features=features)

    def _condition(self, features: BackboneOutput, state: Float[Tensor, "B S"]) -> Float[Tensor, "B d"]:
        summary = self.from_summary(features.summary)
        if self.steer_by_state is not None:
            summary = summary + matched(self.steer_by_state(state), self.from_summary.weight)
        return self.mix(summary)

    def stages(self) -> Mapping[str, Callable[..., object]]:
        """What its time goes into, see `System.stages`."""
        return {"vision-language encoder": self.encode, "planner head": self.attend}


def plan_loss(logits: Float[Tensor, "B L D N"], tokens: Int[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, ""]:
    """Cross-entropy per step and dimension, in nats; padded steps are masked."""
    losses = functional.cross_entropy(logits.float().flatten(0, 2), tokens.flatten(), reduction="none").view(tokens.shape)
    return masked_mean(losses.mean(dim=-1), mask)


def plan_accuracy(
    logits: Float[Tensor, "B L D N"], tokens: Int[Tensor, "B L D"], mask: Bool[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """Share of the unmasked tokens that the most likely class hits."""
    return masked_mean((logits.argmax(-1) == tokens).float().mean(dim=-1), mask)
